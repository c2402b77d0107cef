"""Share a 32-byte secret among n holders so that any t of them can reconstruct it (Shamir, 1979).

t is the reconstruction threshold; fewer than t shares tell nothing about the secret. All arithmetic is in the
field of 2^256 - 189 elements.
"""

import secrets

PRIME = 2**256 - 189
BYTES = 32


def split(secret: int, holders: int, threshold: int) -> list[int]:
    """Return the shares of holders 0 to n-1: a random polynomial of degree t-1 whose value at 0 is `secret`,
    evaluated at 1 to n.
    """
    coefficients = [secret, *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = []
    for x in range(1, holders + 1):
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * x + coefficient) % PRIME
        shares.append(value)
    return shares


def reconstruct(shares: dict[int, int]) -> int:
    """Return the secret from at least t shares, by holder (Lagrange interpolation at 0)."""
    total = 0
    for i, share in shares.items():
        numerator = 1
        denominator = 1
        for j in shares:
            if j != i:
                numerator = numerator * (j + 1) % PRIME
                denominator = denominator * (j - i) % PRIME
        total += share * numerator * pow(denominator, -1, PRIME)
    return total % PRIME


def draw_secret() -> int:
    """Return a uniformly random element of the field."""
    return secrets.randbelow(PRIME)


def to_bytes(value: int) -> bytes:
    """Encode a field element as 32 bytes, big-endian."""
    return value.to_bytes(BYTES, "big")


def from_bytes(data: bytes) -> int:
    """Decode a field element from big-endian bytes."""
    return int.from_bytes(data, "big")
