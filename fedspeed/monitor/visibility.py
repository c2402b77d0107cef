"""The rule that says which part of a record outputs may show. It lists what may be shown: what it does not
know is hidden.
"""

from dataclasses import replace

from fedspeed.monitor.metrics.metric import Metric, Value
from fedspeed.monitor.records import RoundRecord, Summary

HIDDEN_REASON = "the details stay on the host where it happened"
STATUSES_WITH_REASON = ("finished", "early stop")  # endings whose reason names no host and no client


def shows_everything(routing_mode: str) -> bool:
    """Whether outputs may show all that a record holds. Any mode but `plain` is masked, one we do not know
    yet included.

    This is not the opposite of `RoutingConfig.sums_only`: in `plain` between organisations a ledger tells
    sums only, and what else there is to be shown is what this site knows of itself.
    """
    return routing_mode == "plain"


def visible(record: RoundRecord | Summary, routing_mode: str) -> RoundRecord | Summary:
    """The part of a record that outputs may show: in `plain` all of it, in masked modes the counts and sums
    of metrics that say so (`Metric.shown_masked`).

    A mean is a sum over a count. A maximum over ranks is one rank's own value. The text of a failure may name
    a host or a client, so it stays where it happened. Idempotent.
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


def _shown(metrics: tuple[Metric, ...], values: dict[str, Value]) -> dict[str, Value]:
    return {metric.name: values[metric.name] if metric.shown_masked else None for metric in metrics}
