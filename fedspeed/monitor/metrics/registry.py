"""The list of all metrics, and the selections of it for ledger, records, TensorBoard and report.

To add metrics, add a module with a tuple METRICS to this folder, and its name to MODULES (docs/extending.md).
"""

from collections import Counter
from collections.abc import Collection, Iterable
from importlib import import_module
from itertools import permutations
from typing import Literal

from fedspeed.monitor.metrics.metric import NOTHING, Metric

# In the order of tables and records.
MODULES = ("losses", "speed", "traffic", "waits", "federation", "updates", "evaluation")
# Fields of records that are no metrics. No metric may have such a name.
TAKEN = {
    "round",
    "missing",
    "per_client",
    "client",
    "values",
    "status",
    "rounds",
    "total_rounds",
    "reason",
    "exit_code",
    "first_val_loss",
    "last_val_loss",
    "best_val_loss",
    "best_round",
    "restarts",
    "absent",
}


def collected(modules: Iterable[str]) -> tuple[Metric, ...]:
    """Return the metrics of some modules of this folder.

    Raises:
        ValueError: two metrics of a record have the same name, tag or title; a metric has the name of a
        field;
            a ratio precedes the metrics that it divides; or a metric shares a slot with one that reveals
            more.
    """
    found = tuple(metric for name in modules for metric in import_module(f"{__package__}.{name}").METRICS)
    taken = sorted({metric.name for metric in found} & TAKEN)
    if taken:
        raise ValueError(f"metrics may not be called {', '.join(taken)}: records use the name themselves")
    for record in ("round", "client"):
        members = [metric for metric in found if metric.record in (record, "both")]
        for kind in ("name", "tag", "title"):
            counts = Counter(getattr(metric, kind) for metric in members)
            twice = [text for text, count in counts.items() if count > 1 and text]
            if twice:
                raise ValueError(f"the {kind} of a metric of a {record} is given twice: {', '.join(twice)}")
    for index, metric in enumerate(found):
        before = {other.name for other in found[:index] if other.over_rounds or not metric.over_rounds}
        if metric.per == "round" and metric.over and not {metric.of, metric.over} <= before:
            raise ValueError(
                f"metric {metric.name!r} divides {metric.of} by {metric.over}, which must be "
                "metrics before it, with a value in the summary if it is to have one"
            )
    for metric, other in permutations(found, 2):
        is_part = other.per == metric.per and other.slots[:1] != () and other.slots[0] in metric.slots
        if is_part and (unsaid := sorted(other.reveals - metric.reveals)):
            raise ValueError(
                f"metric {metric.name!r} shares a slot with {other.name!r}, which reveals "
                f"{', '.join(unsaid)}; say so of it too"
            )
    return found


METRICS = collected(MODULES)


def of_round() -> tuple[Metric, ...]:
    """Return the metrics in the record of a round."""
    return tuple(metric for metric in METRICS if metric.record in ("round", "both"))


def of_client() -> tuple[Metric, ...]:
    """Return the metrics in the record of a client, which no masked mode shows."""
    return tuple(metric for metric in METRICS if metric.record in ("client", "both"))


def of_summary() -> tuple[Metric, ...]:
    """Return the metrics in the summary of a run."""
    return tuple(metric for metric in METRICS if metric.over_rounds)


def slots(
    per: Literal["client", "rank"],
    sums_only: bool,
    hides: frozenset[str] = NOTHING,
    tasks: Collection[str] | None = None,
) -> tuple[str, ...]:
    """Return the slots of the ledger that each client or rank fills and sends.

    Args:
        sums_only: return only the slots of masked modes.
        hides: leave out the slots of metrics that reveal any of this.
        tasks: evaluation tasks of the run; None: leave out no task.
    """
    sent = [
        metric
        for metric in METRICS
        if metric.per == per
        and (metric.shown_masked or not sums_only)
        and not metric.reveals & hides
        and (not metric.task or tasks is None or metric.task in tasks)
    ]
    return tuple(dict.fromkeys(slot for metric in sent for slot in metric.slots))


def measured() -> dict[str, float]:
    """Measure the metrics that have `measure` on this rank, and return their values by ledger slot."""
    return {metric.slots[0]: float(metric.measure()) for metric in METRICS if metric.measure is not None}
