"""Members of anonymous sums, for the tests of this room."""

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedspeed.routing.anonymous.crypto import public_bytes
from fedspeed.routing.anonymous.parameters import PublicParameters
from fedspeed.routing.anonymous.protocol import Member


class Parties:
    """n members with random words; `attempt` gives them anew, with fresh keys. kinds: classes of those that
    are not what they should be.
    """

    def __init__(self, n: int, words: int = 50, seed: int = 0, kinds=None, **terms):
        self.identities = [Ed25519PrivateKey.generate() for _ in range(n)]
        random = np.random.default_rng(seed)
        self.vectors = [
            random.integers(-(2**24), 2**24, words).astype(np.int32).view(np.uint32) for _ in range(n)
        ]  # no sum leaves 32 bits
        self._terms = {
            "length": words,
            "settings": b"test",
            "relays": min(2, n - 1),
            "chunk_length": 16,
            "threshold": n // 2 + 1,
            **terms,
        }
        self._kinds = kinds or {}

    def attempt(self, number: int = 0, without: frozenset[int] = frozenset(), **changes) -> list[Member]:
        present = [i for i in range(len(self.identities)) if i not in without]
        keys = tuple(public_bytes(self.identities[i]) for i in present)
        hops = min(self._terms["relays"], len(present) - 1)
        terms = PublicParameters(members=keys, attempt=number, **{**self._terms, "relays": hops, **changes})
        return [
            self._kinds.get(i, Member)(terms, place, self.identities[i], lambda i=i: self.vectors[i])
            for place, i in enumerate(present)
        ]

    def sum(self, without: frozenset[int] = frozenset()) -> np.ndarray:
        return np.sum(
            [v for i, v in enumerate(self.vectors) if i not in without], axis=0, dtype=np.uint64
        ).astype(np.uint32)
