"""The ledger of a round as its record: every metric reduced as it says. Pure."""

from typing import Protocol

from fedspeed.monitor.metrics import registry
from fedspeed.monitor.metrics.metric import Metric, Value
from fedspeed.monitor.records import ClientRecord, RoundRecord


class Sums(Protocol):
    """What is asked of a ledger (federation/ledger.py). Slots are called by name."""

    sums_only: bool

    def hides(self, metric: Metric) -> bool: ...  # whether it is told to nobody
    def of_clients(self, name: str): ...  # [clients]
    def total(self, name: str) -> float: ...  # over clients
    def rank_total(self, name: str) -> float: ...
    def rank_mean(self, name: str) -> float: ...
    def rank_max(self, name: str) -> float | None: ...


def round_record(ledger: Sums, number: int, asked: tuple[int, ...], **same: Value) -> RoundRecord:
    """Make the record of a round.

    Args:
        ledger: the sum of what all ranks have told.
        number: of the round; 0 is the evaluation before any training.
        asked: the clients that were asked for an update.
        same: values of metrics that every rank knows alike, by name. Without those that are left out.

    Raises:
        ValueError: `same` names no such metric, or lacks one that every round has.
    """
    values: dict[str, Value] = {}
    for metric in registry.of_round():
        values[metric.name] = metric.value(_amount(metric, ledger, values, same))
    told = {metric.name for metric in registry.of_round() if metric.reduce == "same"}
    if unknown := sorted(same.keys() - told):
        raise ValueError(f"there is no metric of a round that is called {', '.join(unknown)}")
    missing: tuple[int, ...] = ()
    clients: list[ClientRecord] = []
    if not ledger.sums_only:
        received = ledger.of_clients("received")
        missing = tuple(client for client in asked if received[client] <= 0.5)
        clients = [_client_record(client, ledger) for client in range(len(received))]
    return RoundRecord.of(round=number, **values, missing=missing, per_client=tuple(clients))


def _amount(metric: Metric, ledger: Sums, values: dict[str, Value], same: dict[str, Value]) -> float | None:
    """Reduce one metric. `values` are those of the metrics before it in the list."""
    if ledger.sums_only and not metric.shown_masked:
        return None  # it was not told
    if ledger.hides(metric):
        return None
    of = metric.of or metric.name
    total = ledger.total if metric.per == "client" else ledger.rank_total
    match metric.reduce:
        case "same":
            return same.get(metric.name)
        case "sum":
            return total(of)
        case "mean":
            return ledger.rank_mean(of)
        case "max":
            return ledger.rank_max(of) or None  # 0: nobody has measured it
    if metric.per == "round":
        both = values[of], values[metric.over]
        return None if None in both else _ratio(metric, *both)
    return _ratio(metric, total(of), total(metric.over))


def _client_record(client: int, ledger: Sums) -> ClientRecord:
    values: dict[str, Value] = {}
    for metric in registry.of_client():
        if ledger.hides(metric):
            values[metric.name] = metric.value(None)
            continue
        amounts = [float(ledger.of_clients(slot)[client]) for slot in metric.slots]
        values[metric.name] = metric.value(amounts[0] if metric.reduce == "sum" else _ratio(metric, *amounts))
    return ClientRecord.of(client=client, **values)


def _ratio(metric: Metric, of: float, over: float) -> float | None:
    """The ratio of two sums; a share stays within 0 and 1, whatever clocks have measured. None where there is
    no whole.
    """
    if not over > 0:
        return None
    ratio = of / over
    if metric.unit in ("share", "accuracy"):
        ratio = min(1.0, max(0.0, ratio))
    return 1 - ratio if metric.rest else ratio
