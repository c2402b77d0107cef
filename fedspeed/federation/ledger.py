"""Counters and losses of one round, of all clients and ranks, as one vector of float64: every rank fills its
own slots, and the sum over ranks is the full ledger. The list of metrics (monitor/metrics) defines the slots.

In the masked modes there is one slot for all clients and one for all ranks, and only of metrics that these
modes may show, so that no participant learns more than those sums.
"""

from collections.abc import Collection

import numpy as np

from fedspeed.monitor.metrics import registry
from fedspeed.monitor.metrics.metric import NOTHING, Metric

# Slots that no output shows; all ranks decide from their sums.
CLIENT_SIGNALS = ("delta_square",)
RANK_SIGNALS = ("ranks", "stop", "renew")
_AMOUNT_UNITS = ("loss", "accuracy", "share", "seconds", "tokens", "bytes", "count")
_AMOUNTS = frozenset(
    (*CLIENT_SIGNALS, *RANK_SIGNALS)
    + tuple(slot for metric in registry.METRICS if metric.unit in _AMOUNT_UNITS for slot in metric.slots)
)


class Ledger:
    """One rank's share of a round's counters, or the sum of all shares.

    Losses are sums over answer tokens. Seconds are of one rank, and the seconds of its stages add up to at
    most its `wall_s`. `delta_square` is the squared norm of a client's delta times its weight, `ranks` is 1,
    `stop` is 1 where the scheduler asked this rank to end, and `renew` is 1 where it has a newer roster.

    Args:
        clients, ranks: numbers of them in the whole run.
        vector: the sum, float64; None: an empty share.
        sums_only: whether only sums over all clients and ranks may be known (the masked modes).
        hides: what transforms of updates hide (monitor.metrics.metric.REVEALABLE). There is no slot for what
            would reveal it, not even as a sum.
        tasks: evaluation tasks of the run, which alone have slots.

    Raises:
        ValueError: the vector has another length.
    """

    def __init__(
        self,
        clients: int,
        ranks: int,
        vector: np.ndarray | None = None,
        *,
        sums_only: bool = False,
        hides: frozenset[str] = NOTHING,
        tasks: Collection[str] = (),
    ):
        self.sums_only = sums_only
        self._hides = hides
        self._tasks = frozenset(tasks)
        if sums_only:
            clients = 1
            ranks = 1
        self._known = {
            "client": {*registry.slots("client", False), *CLIENT_SIGNALS},
            "rank": {*registry.slots("rank", False), *RANK_SIGNALS},
        }
        client_slots = (*registry.slots("client", sums_only, hides, tasks), *CLIENT_SIGNALS)
        rank_slots = (*registry.slots("rank", sums_only, hides, tasks), *RANK_SIGNALS)
        split = clients * len(client_slots)
        size = split + ranks * len(rank_slots)
        self.vector = np.zeros(size) if vector is None else vector
        if self.vector.shape != (size,):
            raise ValueError(
                f"the ledger of {clients} clients and {ranks} ranks has {size} values, "
                f"found {self.vector.shape}; all ranks must run one version of FedSpeed"
            )
        by_client = self.vector[:split].reshape(clients, len(client_slots))
        by_rank = self.vector[split:].reshape(ranks, len(rank_slots))
        self._clients = {name: by_client[:, index] for index, name in enumerate(client_slots)}
        self._ranks = {name: by_rank[:, index] for index, name in enumerate(rank_slots)}

    def add_client(self, client: int, **values: float) -> None:
        """Add this rank's values for a client, by slot. Values without a slot in this mode stay on this rank.

        Raises:
            ValueError: there is no such slot in any mode.
        """
        for name, value in values.items():
            if self._is_shared("client", name):
                self._clients[name][0 if self.sums_only else client] += value

    def set_rank(self, index: int, **values: float) -> None:
        """Set a rank's values, by slot. Values without a slot in this mode stay on the rank.

        Args:
            index: of the rank among those that work (`RankRole.worker_index`).

        Raises:
            ValueError: there is no such slot in any mode.
        """
        for name, value in values.items():
            if self._is_shared("rank", name):
                self._ranks[name][0 if self.sums_only else index] = value

    def lacks(self, metric: Metric) -> bool:
        """Return whether a metric has no slot: it would reveal what transforms of updates hide, or it is the
        score of an evaluation task that the run does not have.
        """
        return bool(metric.reveals & self._hides) or bool(metric.task and metric.task not in self._tasks)

    def has_client_slot(self, name: str) -> bool:
        """Return whether there is a slot of this name for clients in this mode."""
        return name in self._clients

    def total(self, name: str) -> float:
        """Return the sum of a slot over all clients."""
        return float(self._clients[name].sum())

    def rank_total(self, name: str) -> float:
        """Return the sum of a slot over all ranks."""
        return float(self._ranks[name].sum())

    def rank_mean(self, name: str) -> float:
        """Return the mean of a slot over all ranks."""
        return self.rank_total(name) / max(1.0, self.rank_total("ranks"))

    def rank_max(self, name: str) -> float | None:
        """Return the largest value of a slot over all ranks; None where only sums are known."""
        return None if self.sums_only else float(self._ranks[name].max())

    def of_clients(self, name: str) -> np.ndarray:
        """Return a view of a slot for all clients: [clients] float64, or [1] where only sums are known."""
        return self._clients[name]

    def of_ranks(self, name: str) -> np.ndarray:
        """Return a view of a slot for all ranks: [ranks] float64, or [1] where only sums are known."""
        return self._ranks[name]

    def sums(self) -> dict[str, float]:
        """Return the sum of each slot over all clients, or over all ranks, by name."""
        sums = {name: float(values.sum()) for name, values in self._ranks.items()}
        return sums | {name: float(values.sum()) for name, values in self._clients.items()}

    def amounts(self) -> frozenset[str]:
        """Return the names of slots that are never negative on any rank: counts, seconds, bytes, losses."""
        return _AMOUNTS & self.sums().keys()

    def _is_shared(self, per: str, name: str) -> bool:
        if name not in self._known[per]:
            known = ", ".join(sorted(self._known[per]))
            raise ValueError(f"no metric has a slot {name!r} for a {per}; there are {known}")
        return name in (self._clients if per == "client" else self._ranks)
