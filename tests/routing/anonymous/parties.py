"""Members of anonymous sums with random integers, for the tests."""

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedspeed.routing.anonymous.crypto import public_bytes
from fedspeed.routing.anonymous.parameters import PublicParameters
from fedspeed.routing.anonymous.protocol import Member


class Parties:
    """The identities and integers of n members, which make attempts together.

    Attributes:
        integers: by member, [length] uint32, what it adds to the sum.
    """

    def __init__(self, n: int, length: int = 50, seed: int = 0, kinds=None, **parameters):
        """Draw identities and integers.

        Args:
            kinds: by number, the classes of members that deviate from the protocol.
            parameters: of every attempt, in place of those here (`PublicParameters`).
        """
        self.identities = [Ed25519PrivateKey.generate() for _ in range(n)]
        random = np.random.default_rng(seed)
        # Small enough that no sum overflows.
        self.integers = [
            random.integers(-(2**24), 2**24, length).astype(np.int32).view(np.uint32) for _ in range(n)
        ]
        self._parameters = {
            "length": length,
            "settings": b"test",
            "relays": min(2, n - 1),
            "chunk_length": 16,
            "threshold": n // 2 + 1,
            **parameters,
        }
        self._kinds = kinds or {}

    def attempt(self, number: int = 0, without: frozenset[int] = frozenset(), **changes) -> list[Member]:
        """Return the members of an attempt, with fresh keys."""
        present = [i for i in range(len(self.identities)) if i not in without]
        keys = tuple(public_bytes(self.identities[i]) for i in present)
        relays = min(self._parameters["relays"], len(present) - 1)
        options = {**self._parameters, "relays": relays, **changes}
        parameters = PublicParameters(members=keys, attempt=number, **options)
        return [
            self._kinds.get(i, Member)(parameters, me, self.identities[i], lambda i=i: self.integers[i])
            for me, i in enumerate(present)
        ]

    def sum(self, without: frozenset[int] = frozenset()) -> np.ndarray:
        """Return the sum that the attempt must end with: [length] uint32."""
        present = [integers for i, integers in enumerate(self.integers) if i not in without]
        return np.sum(present, axis=0, dtype=np.uint64).astype(np.uint32)
