"""Numbers as integers modulo 2^32: in this ring masks cancel exactly and sums are exact. Pure.

The values of an update become fixed-point integers: each is scaled by 2^30 over a bound that all members
know, and rounded up or down at random so that the sum has no bias. Values that must arrive exactly (counts,
losses, weights) are cut into limbs of 16 bits, which do not overflow for up to 65 536 members.
"""

import threading
from collections.abc import Callable

import numpy as np

# The bound becomes 2^30. The bound is the sum of all members' norms, so that sums of all members' values stay
# below 2^31.
BITS = 30
LIMBS = 8
LIMB_BITS = 16
FRACTION_BITS = 48  # an exact value: 80 bits before the binary point, 48 behind it
EXACT_LIMIT = 2.0 ** (LIMBS * LIMB_BITS - FRACTION_BITS - 1) / 2**16  # magnitude of one member's exact value
_PIECE = 1 << 16  # values that are computed at a time: they fit in the cache

_THREAD = threading.local()

RandomStream = Callable[[np.ndarray], None]  # fills [n] uint32 with random bits


def encode(values: np.ndarray, bound: float, random: RandomStream, out: np.ndarray) -> int:
    """Write `values` [n] float32 as fixed-point integers into `out` [n] uint32.

    Args:
        bound: the magnitude that becomes 2^30; 0: all integers are zero.

    Returns:
        How many values were clipped because they are above the bound, or set to zero because they are not
        finite.
    """
    if not bound:
        out[:] = 0
        return int(np.count_nonzero(values))
    scale = _scale(bound)
    clipped = 0
    limit = np.float32(2.0**BITS - 128)  # two float32 steps below 2^30: noise cannot pass it
    scaled, noise, bits = _scratch()
    for start in range(0, len(values), _PIECE):
        n = min(_PIECE, len(values) - start)
        x = scaled[:n]
        u = noise[:n]
        b = bits[: -(-n // 2)]
        with np.errstate(over="ignore"):
            np.multiply(values[start : start + n], scale, out=x)
        if not (x.max() <= limit and x.min() >= -limit):
            clipped += int(np.count_nonzero(~(np.abs(x) <= limit)))
            np.clip(x, -limit, limit, out=x)
            x[~np.isfinite(values[start : start + n])] = 0
        random(b)
        np.multiply(b.view(np.uint16)[:n], np.float32(2.0**-16), out=u)
        np.add(x, u, out=x)
        np.floor(x, out=x)
        np.copyto(out[start : start + n].view(np.int32), x, casting="unsafe")
    return clipped


def _scratch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return memory of this thread for one piece: [_PIECE] float32 twice, and [_PIECE / 2] uint32."""
    if not hasattr(_THREAD, "scratch"):
        floats = np.empty((2, _PIECE), np.float32)
        _THREAD.scratch = (floats[0], floats[1], np.empty(_PIECE // 2, np.uint32))
    return _THREAD.scratch


def decode(integers: np.ndarray, bound: float, out: np.ndarray) -> None:
    """Write sums of fixed-point integers [n] uint32 as numbers into `out` [n], rounded once.

    Args:
        bound: as they were encoded with.
    """
    unit = 1.0 / float(_scale(bound)) if bound else 0.0
    for start in range(0, len(integers), _PIECE):
        piece = integers[start : start + _PIECE].view(np.int32)
        np.multiply(piece, unit, out=out[start : start + _PIECE], dtype=np.float64, casting="same_kind")


def _scale(bound: float) -> np.float32:
    """Return the integers in one unit of a value. Encoding and decoding need the same precision here, else a
    sum would be off by the rounding of the scale.
    """
    return np.float32(2.0**BITS / bound)


def encode_exact(values: np.ndarray) -> np.ndarray:
    """Return values [n] float64, rounded to multiples of 2^-48, as limbs: [n * LIMBS] uint32.

    Raises:
        ValueError: a value is not finite, or its magnitude is not below EXACT_LIMIT.
    """
    if not (np.isfinite(values).all() and (np.abs(values) < EXACT_LIMIT).all()):
        raise ValueError(f"values of an exact sum must be finite and below {EXACT_LIMIT:.3g}")
    modulus = 1 << LIMBS * LIMB_BITS
    limbs = []
    for value in values.tolist():
        numerator, denominator = value.as_integer_ratio()
        if denominator > 2**FRACTION_BITS:
            fixed = round(numerator * 2**FRACTION_BITS / denominator)
        else:
            fixed = numerator * (2**FRACTION_BITS // denominator)
        fixed %= modulus
        limbs += [fixed >> LIMB_BITS * k & 0xFFFF for k in range(LIMBS)]
    return np.array(limbs, np.uint32)


def decode_exact(integers: np.ndarray) -> np.ndarray:
    """Return the values [n] float64 of sums of limbs [n * LIMBS] uint32."""
    modulus = 1 << LIMBS * LIMB_BITS
    values = []
    for limbs in integers.reshape(-1, LIMBS).tolist():
        fixed = sum(limb << LIMB_BITS * k for k, limb in enumerate(limbs)) % modulus
        values.append((fixed - modulus if fixed >= modulus // 2 else fixed) / 2**FRACTION_BITS)
    return np.array(values)
