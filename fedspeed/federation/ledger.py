"""What each client and each rank did in a round, as words of one sum: everyone fills its own slots, the sum of all fills the ledger.

In the masked modes there is one slot for all clients and one for all ranks: nobody learns more than sums.
"""

import numpy as np

CLIENT_WORDS = ("asked", "train_loss", "tokens", "val_loss", "val_tokens", "exact", "rows", "steps", "received", "compute_s", "gather_s", "exchange_s",
                "idle_s", "bytes_sent", "peak_bytes", "moved")
RANK_WORDS = ("ranks", "compute_s", "gather_s", "exchange_s", "idle_s", "bytes_sent", "peak_bytes", "device_bytes", "loaded_bytes", "step_s", "stop", "renew",
              "bubble_s", "passes_s", "exchanged_s", "waited_s", "wall_s")


class Ledger:
    """Losses are sums over answer tokens. Seconds are of one rank, and its stages are parts of its `wall_s`. `stop` is 1 where the scheduler asked this
    rank to end, `renew` where it has a newer roster.
    """

    def __init__(self, clients: int, ranks: int, vector: np.ndarray | None = None, sums_only: bool = False):
        self.sums_only = sums_only
        if sums_only:
            clients = ranks = 1
        split = clients * len(CLIENT_WORDS)
        self.vector = np.zeros(split + ranks * len(RANK_WORDS)) if vector is None else vector
        self._clients = self.vector[:split].reshape(clients, len(CLIENT_WORDS))
        self._ranks = self.vector[split:].reshape(ranks, len(RANK_WORDS))

    def add_client(self, client: int, **words: float) -> None:
        for word, value in words.items():
            self._clients[0 if self.sums_only else client, CLIENT_WORDS.index(word)] += value

    def set_rank(self, slot: int, **words: float) -> None:
        for word, value in words.items():
            self._ranks[0 if self.sums_only else slot, RANK_WORDS.index(word)] = value

    def total(self, word: str) -> float:
        """Over all clients."""
        return float(self.of_clients(word).sum())

    def rank_mean(self, word: str) -> float:
        return float(self.of_ranks(word).sum()) / max(1.0, float(self.of_ranks("ranks").sum()))

    def rank_max(self, word: str) -> float | None:
        """None where only sums are known."""
        return None if self.sums_only else float(self.of_ranks(word).max())

    def of_clients(self, word: str) -> np.ndarray:
        """[clients] float64; one number where only sums are known."""
        return self._clients[:, CLIENT_WORDS.index(word)]

    def of_ranks(self, word: str) -> np.ndarray:
        """[ranks] float64; one number where only sums are known."""
        return self._ranks[:, RANK_WORDS.index(word)]
