"""The one list of metrics, and the questions that ledger, records, TensorBoard and report ask it.

A new metric is one module in this folder with a tuple METRICS, and its name in MODULES (docs/extending.md).
"""

from collections import Counter
from collections.abc import Iterable
from importlib import import_module
from itertools import permutations
from typing import Literal

from fedspeed.monitor.metrics.metric import NOTHING, Metric

# In the order of tables and records.
MODULES = ("losses", "speed", "traffic", "waits", "federation", "updates")
# What records hold beside metrics: no metric may be called so.
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
    """Collect the metrics of modules of this folder.

    Raises:
        ValueError: a record or a chart would have two of one name, or one of a name that records use
            themselves, or a ratio of metrics stands before them, or one would show in its slots what another
            says that it reveals.
    """
    found = tuple(metric for name in modules for metric in import_module(f"{__package__}.{name}").METRICS)
    taken = sorted({metric.name for metric in found} & TAKEN)
    if taken:
        raise ValueError(f"metrics may not be called {', '.join(taken)}: records use the name themselves")
    for record in ("round", "client"):
        own = [metric for metric in found if metric.record in (record, "both")]
        for kind in ("name", "tag", "title"):
            counts = Counter(getattr(metric, kind) for metric in own)
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
    """List the metrics in the record of a round."""
    return tuple(metric for metric in METRICS if metric.record in ("round", "both"))


def of_client() -> tuple[Metric, ...]:
    """List the metrics in the record of a client, which no masked mode shows."""
    return tuple(metric for metric in METRICS if metric.record in ("client", "both"))


def of_summary() -> tuple[Metric, ...]:
    """List the metrics that a run's summary has one value of."""
    return tuple(metric for metric in METRICS if metric.over_rounds)


def slots(
    per: Literal["client", "rank"], sums_only: bool, hides: frozenset[str] = NOTHING
) -> tuple[str, ...]:
    """List the slots of the ledger that each client or rank fills and tells.

    Args:
        sums_only: only those of masked modes. hides: only those of metrics that reveal nothing of it.
    """
    told = [
        metric
        for metric in METRICS
        if metric.per == per and (metric.shown_masked or not sums_only) and not metric.reveals & hides
    ]
    return tuple(dict.fromkeys(slot for metric in told for slot in metric.slots))


def measured() -> dict[str, float]:
    """Measure, on this rank and now, the metrics that measure themselves; by the slot of the ledger."""
    return {metric.slots[0]: float(metric.measure()) for metric in METRICS if metric.measure is not None}
