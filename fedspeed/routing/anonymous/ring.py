"""Numbers as elements of the ring of integers modulo 2^32, in which masks cancel exactly and sums are exact. Pure.

An update is fixed-point: round(x / step) with a step that all know, rounded up or down at random so that the sum has no bias. Words that must
come through exactly (counts, losses, weights) are cut into 16-bit limbs, which do not overflow for up to 65 536 participants.
"""

from collections.abc import Callable

import numpy as np

BITS = 30  # of an update's largest value: sums of what all participants give stay within 2^31, as their weights sum to no more than one
LIMBS, LIMB_BITS, FRACTION_BITS = 8, 16, 48  # an exact word: 80 bits before the point, 48 behind it
EXACT_LIMIT = 2.0 ** (LIMBS * LIMB_BITS - FRACTION_BITS - 1) / 2**16  # of one participant's word
_PIECE = 1 << 16  # elements computed at a time, in the cache

Stream = Callable[[np.ndarray], None]  # fills uint32 with random bits


def encode(values: np.ndarray, span: float, random: Stream, out: np.ndarray, share: float = 1.0) -> int:
    """Fixed-point words of `values` [n] float32 into `out` [n] uint32; returns how many were beyond ±span * share and were cut.

    Args:
        span: what the largest word stands for. share: this participant's of it; shares add up to at most one, so that sums stay within 32 bits.
    """
    scale, cut = np.float32(2.0**BITS / span), 0
    limit = np.float32((2.0**BITS - 128) * share)  # float32 has no integer closer below 2^30 + a half
    scaled, noise, bits = np.empty(_PIECE, np.float32), np.empty(_PIECE, np.float32), np.empty(_PIECE, np.uint32)
    for start in range(0, len(values), _PIECE):
        n = min(_PIECE, len(values) - start)
        x, u, b = scaled[:n], noise[:n], bits[:n]
        np.multiply(values[start:start + n], scale, out=x)
        cut += int(np.count_nonzero(np.abs(x) > limit))
        np.clip(x, -limit, limit, out=x)
        random(b)
        np.right_shift(b, np.uint32(8), out=b)
        np.multiply(b, np.float32(2.0**-24), out=u)
        np.add(x, u, out=x)
        np.floor(x, out=x)
        np.copyto(out[start:start + n].view(np.int32), x, casting="unsafe")
    return cut


def decode(words: np.ndarray, span: float) -> np.ndarray:
    """[n] float64 of the sums of fixed-point words [n] uint32."""
    return words.view(np.int32) * (span / 2.0**BITS)


def encode_exact(values: np.ndarray) -> np.ndarray:
    """[n * LIMBS] uint32 of finite float64 words; values are rounded to multiples of 2^-48.

    Raises:
        ValueError: a value is not finite, or beyond EXACT_LIMIT.
    """
    if not (np.isfinite(values).all() and (np.abs(values) < EXACT_LIMIT).all()):
        raise ValueError(f"words of an exact sum must be finite and below {EXACT_LIMIT:.3g}")
    whole = 1 << LIMBS * LIMB_BITS
    limbs = []
    for value in values.tolist():
        mantissa, denominator = value.as_integer_ratio()
        fixed = round(mantissa * 2**FRACTION_BITS / denominator) if denominator > 2**FRACTION_BITS else mantissa * (2**FRACTION_BITS // denominator)
        fixed %= whole
        limbs += [fixed >> LIMB_BITS * k & 0xFFFF for k in range(LIMBS)]
    return np.array(limbs, np.uint32)


def decode_exact(words: np.ndarray) -> np.ndarray:
    """[n] float64 of sums of encoded words [n * LIMBS]."""
    whole = 1 << LIMBS * LIMB_BITS
    out = []
    for limbs in words.reshape(-1, LIMBS).tolist():
        fixed = sum(limb << LIMB_BITS * k for k, limb in enumerate(limbs)) % whole
        out.append((fixed - whole if fixed >= whole // 2 else fixed) / 2**FRACTION_BITS)
    return np.array(out)


def check_word(words: np.ndarray, factors: Stream) -> int:
    """Sum of random factor * word over [n] uint32, modulo 2^64, words taken as signed.

    Of two vectors that differ, no more than one in 2^32 choices of 32-bit factors gives the same sum: for a difference d with |d| < 2^32, factor * d
    takes each value modulo 2^64 for at most one factor.
    """
    total, rho, product = 0, np.empty(_PIECE, np.uint32), np.empty(_PIECE, np.int64)
    for start in range(0, len(words), _PIECE):
        n = min(_PIECE, len(words) - start)
        factors(rho[:n])
        np.multiply(words[start:start + n].view(np.int32), rho[:n], out=product[:n], dtype=np.int64)
        total += int(product[:n].view(np.uint64).sum(dtype=np.uint64))
    return total % 2**64
