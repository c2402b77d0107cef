"""What each client and each rank did in a round, as the values of one sum: everyone fills its own slots, the
sum of all fills the ledger. What the slots are follows from the list of metrics (monitor/metrics).

In the masked modes there is one slot for all clients and one for all ranks, and only of metrics that these
modes may show: nobody learns more than those sums.
"""

import numpy as np

from fedspeed.monitor.metrics import registry
from fedspeed.monitor.metrics.metric import NOTHING, Metric

# What no output shows, but all ranks decide by.
CLIENT_SIGNALS = ("moved",)
RANK_SIGNALS = ("ranks", "stop", "renew")


class Ledger:
    """One rank's share of what a round came to, or the sum of all shares.

    Losses are sums over answer tokens. Seconds are of one rank, and its stages are parts of its `wall_s`.
    `moved` is a client's squared change by its weight, `ranks` is 1, `stop` is 1 where the scheduler asked
    this rank to end, and `renew` where it has a newer roster.

    Args:
        clients, ranks: of the whole run.
        vector: the sum, float64; None: a share that is to be filled.
        sums_only: whether only sums over all clients and ranks are told (the masked modes).
        hides: what transforms of updates hide (monitor.metrics.metric.BESIDE). Slots that reveal it are not
            told at all, not even as sums: there are none.
    """

    def __init__(
        self,
        clients: int,
        ranks: int,
        vector: np.ndarray | None = None,
        *,
        sums_only: bool = False,
        hides: frozenset[str] = NOTHING,
    ):
        self.sums_only = sums_only
        self._hides = hides
        if sums_only:
            clients = 1
            ranks = 1
        self._known = {
            "client": {*registry.slots("client", False), *CLIENT_SIGNALS},
            "rank": {*registry.slots("rank", False), *RANK_SIGNALS},
        }
        client_slots = (*registry.slots("client", sums_only, hides), *CLIENT_SIGNALS)
        rank_slots = (*registry.slots("rank", sums_only, hides), *RANK_SIGNALS)
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
        """Add what this rank did for a client, by slot. What may not be told stays on this rank.

        Raises:
            ValueError: there is no such slot.
        """
        for name, value in values.items():
            if self._is_told("client", name):
                self._clients[name][0 if self.sums_only else client] += value

    def set_rank(self, place: int, **values: float) -> None:
        """Say what the rank at `place` among the working ranks did, by slot. What may not be told stays on
        it.

        Raises:
            ValueError: there is no such slot.
        """
        for name, value in values.items():
            if self._is_told("rank", name):
                self._ranks[name][0 if self.sums_only else place] = value

    def hides(self, metric: Metric) -> bool:
        """Say whether a metric is told to nobody, not even as a sum."""
        return bool(metric.reveals & self._hides)

    def tells(self, name: str) -> bool:
        """Say whether a slot of the clients is told."""
        return name in self._clients

    def total(self, name: str) -> float:
        """Sum a slot over all clients."""
        return float(self._clients[name].sum())

    def rank_total(self, name: str) -> float:
        """Sum a slot over all ranks."""
        return float(self._ranks[name].sum())

    def rank_mean(self, name: str) -> float:
        """Average a slot over all ranks."""
        return self.rank_total(name) / max(1.0, self.rank_total("ranks"))

    def rank_max(self, name: str) -> float | None:
        """Find the largest value of a slot over all ranks; None where only sums are known."""
        return None if self.sums_only else float(self._ranks[name].max())

    def of_clients(self, name: str) -> np.ndarray:
        """View a slot of all clients: [clients] float64; one number where only sums are known."""
        return self._clients[name]

    def of_ranks(self, name: str) -> np.ndarray:
        """View a slot of all ranks: [ranks] float64; one number where only sums are known."""
        return self._ranks[name]

    def _is_told(self, per: str, name: str) -> bool:
        if name not in self._known[per]:
            known = ", ".join(sorted(self._known[per]))
            raise ValueError(f"no metric has a slot {name!r} for a {per}; there are {known}")
        return name in (self._clients if per == "client" else self._ranks)
