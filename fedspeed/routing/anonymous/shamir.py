"""Sharing a 32-byte secret among n holders, any t of whom can rebuild it (Shamir, 1979), over the field of
2^256 - 189 elements.
"""

import secrets

PRIME = 2**256 - 189
BYTES = 32


def split(secret: int, holders: int, threshold: int) -> list[int]:
    """Shares of holders 0 to n-1: a random polynomial of degree t-1 with `secret` at 0, at the points 1 to
    n.
    """
    coefficients = [secret, *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = []
    for x in range(1, holders + 1):
        value = 0
        for c in reversed(coefficients):
            value = (value * x + c) % PRIME
        shares.append(value)
    return shares


def rebuild(shares: dict[int, int]) -> int:
    """The secret, from at least t shares by holder (Lagrange's formula at 0)."""
    total = 0
    for i, share in shares.items():
        over = 1
        under = 1
        for j in shares:
            if j != i:
                over = over * (j + 1) % PRIME
                under = under * (j - i) % PRIME
        total += share * over * pow(under, -1, PRIME)
    return total % PRIME


def draw() -> int:
    return secrets.randbelow(PRIME)


def to_bytes(value: int) -> bytes:
    return value.to_bytes(BYTES, "big")


def from_bytes(data: bytes) -> int:
    return int.from_bytes(data, "big")
