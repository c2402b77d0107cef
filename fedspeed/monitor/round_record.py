"""The record of a round from its ledger: every metric reduced by its own rule. Pure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from fedspeed.monitor.metrics import registry
from fedspeed.monitor.metrics.metric import Metric, Value
from fedspeed.monitor.records import ClientRecord, RoundRecord

if TYPE_CHECKING:
    import numpy as np


class Sums(Protocol):
    """The sums of a ledger (federation/ledger.py), by the name of the slot."""

    sums_only: bool

    def lacks(self, metric: Metric) -> bool:
        """Tell whether the ledger has no values of a metric, which are hidden or not of this run."""
        ...

    def of_clients(self, name: str) -> "Sequence[float] | np.ndarray":
        """Return the values of all clients [clients]."""
        ...

    def total(self, name: str) -> float:
        """Return the sum over the clients."""
        ...

    def rank_total(self, name: str) -> float:
        """Return the sum over the ranks."""
        ...

    def rank_mean(self, name: str) -> float:
        """Return the mean over the ranks."""
        ...

    def rank_max(self, name: str) -> float | None:
        """Return the maximum over the ranks."""
        ...


def round_record(ledger: Sums, number: int, asked: tuple[int, ...], **same: Value) -> RoundRecord:
    """Make the record of a round.

    Args:
        ledger: the sums of the values of all ranks.
        number: of the round; 0 is the evaluation before any training.
        asked: the clients from which an update was requested.
        same: values of metrics that are equal on all ranks, by name. A metric that is left out has no value.

    Raises:
        ValueError: `same` has an unknown metric, or lacks one that every round has.
    """
    values: dict[str, Value] = {}
    for metric in registry.of_round():
        values[metric.name] = metric.value(_amount(metric, ledger, values, same))
    known = {metric.name for metric in registry.of_round() if metric.reduce == "same"}
    if unknown := sorted(same.keys() - known):
        raise ValueError(f"there is no metric of a round that is called {', '.join(unknown)}")
    missing: tuple[int, ...] = ()
    clients: list[ClientRecord] = []
    if not ledger.sums_only:
        received = ledger.of_clients("received")
        missing = tuple(client for client in asked if received[client] <= 0.5)
        clients = [_client_record(client, ledger) for client in range(len(received))]
    return RoundRecord.of(round=number, **values, missing=missing, per_client=tuple(clients))


def _amount(metric: Metric, ledger: Sums, values: dict[str, Value], same: dict[str, Value]) -> float | None:
    """Reduce one metric; `values` are those of the metrics before it in the list."""
    if ledger.sums_only and not metric.shown_masked:
        return None
    if ledger.lacks(metric):
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
            return ledger.rank_max(of) or None  # 0: no rank has measured it
    if metric.per == "round":
        part = values[of]
        whole = values[metric.over]
        return None if part is None or whole is None else _ratio(metric, part, whole)
    return _ratio(metric, total(of), total(metric.over))


def _client_record(client: int, ledger: Sums) -> ClientRecord:
    """Return the record of one client."""
    values: dict[str, Value] = {}
    for metric in registry.of_client():
        if ledger.lacks(metric):
            values[metric.name] = metric.value(None)
            continue
        amounts = [float(ledger.of_clients(slot)[client]) for slot in metric.slots]
        values[metric.name] = metric.value(amounts[0] if metric.reduce == "sum" else _ratio(metric, *amounts))
    return ClientRecord.of(client=client, **values)


def _ratio(metric: Metric, of: float, over: float) -> float | None:
    """Return the ratio of two sums, or None if the denominator is 0. A share is limited to [0, 1], since
    clocks are not exact.
    """
    if not over > 0:
        return None
    ratio = of / over
    if metric.unit in ("share", "accuracy"):
        ratio = min(1.0, max(0.0, ratio))
    return 1 - ratio if metric.rest else ratio
