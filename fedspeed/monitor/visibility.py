"""The rule for which values of a record outputs may show. It lists what may be shown; everything else is
hidden.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from fedspeed.monitor.metrics.metric import Metric, Value
from fedspeed.monitor.records import RoundRecord, Summary

Shown = TypeVar("Shown", RoundRecord, Summary)
HIDDEN_REASON = "the details stay on the host where it happened"
STATUSES_WITH_REASON = ("finished", "early stop")  # their reason names no host and no client


def shows_everything(routing_mode: str) -> bool:
    """Tell whether outputs may show all values of a record. Every mode but `plain` is masked, including modes
    that do not exist yet.

    The opposite of `RoutingConfig.sums_only` is something else: in `plain` between organisations a ledger
    sends sums only, and everything else that is shown is what this site knows about itself.
    """
    return routing_mode == "plain"


def visible(record: Shown, routing_mode: str) -> Shown:
    """Return a record with the values that outputs may show: in `plain` all of them, in masked modes the
    counts and sums of metrics with `Metric.shown_masked`.

    A mean is a sum divided by a count; a maximum over ranks would be the value of a single rank. The text of
    a failure may name a host or a client, so it is not shown elsewhere. Idempotent.
    """
    if shows_everything(routing_mode):
        return record
    values = _shown(record.metrics(), record.values)
    if isinstance(record, RoundRecord):
        return RoundRecord(round=record.round, values=values)
    return Summary(
        status=record.status,
        rounds=record.rounds,
        total_rounds=record.total_rounds,
        reason=record.reason if record.status in STATUSES_WITH_REASON else HIDDEN_REASON,
        exit_code=record.exit_code,
        first_val_loss=record.first_val_loss,
        last_val_loss=record.last_val_loss,
        best_val_loss=record.best_val_loss,
        best_round=record.best_round,
        restarts=record.restarts,
        values=values,
        missing=tuple(replace(gap, clients=()) for gap in record.missing),
        absent=record.absent,
    )


def _shown(metrics: tuple[Metric, ...], values: Mapping[str, Value]) -> dict[str, Value]:
    return {metric.name: values[metric.name] if metric.shown_masked else None for metric in metrics}
