"""What each client and each rank did in a round, as words of one sum: everyone fills its own slots, the sum of all fills the ledger."""

import numpy as np

CLIENT_WORDS = ("train_loss", "tokens", "val_loss", "val_tokens", "exact", "rows", "steps", "received", "compute_s", "gather_s", "exchange_s",
                "idle_s", "bytes_sent", "peak_bytes")
RANK_WORDS = ("compute_s", "gather_s", "exchange_s", "idle_s", "bytes_sent", "peak_bytes", "device_bytes", "loaded_bytes", "step_s", "stop")


class Ledger:
    """Losses are sums over answer tokens, seconds are of one rank; `stop` is 1 where the scheduler asked this rank to end."""

    def __init__(self, clients: int, ranks: int, vector: np.ndarray | None = None):
        split = clients * len(CLIENT_WORDS)
        self.vector = np.zeros(split + ranks * len(RANK_WORDS)) if vector is None else vector
        self._clients = self.vector[:split].reshape(clients, len(CLIENT_WORDS))
        self._ranks = self.vector[split:].reshape(ranks, len(RANK_WORDS))

    def add_client(self, client: int, **words: float) -> None:
        for word, value in words.items():
            self._clients[client, CLIENT_WORDS.index(word)] += value

    def set_rank(self, slot: int, **words: float) -> None:
        for word, value in words.items():
            self._ranks[slot, RANK_WORDS.index(word)] = value

    def of_clients(self, word: str) -> np.ndarray:
        """[clients] float64."""
        return self._clients[:, CLIENT_WORDS.index(word)]

    def of_ranks(self, word: str) -> np.ndarray:
        """[ranks] float64."""
        return self._ranks[:, RANK_WORDS.index(word)]
