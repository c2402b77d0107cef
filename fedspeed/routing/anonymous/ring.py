"""Numbers as elements of the ring of integers modulo 2^32, in which masks cancel exactly and sums are exact.
Pure.

An update is fixed-point: round(x / step) with a step that all know, rounded up or down at random so that the
sum has no bias. Words that must come through exactly (counts, losses, weights) are cut into 16-bit limbs,
which do not overflow for up to 65 536 participants.
"""

from collections.abc import Callable

import numpy as np

# of an update's largest value: sums of what all participants give stay within 2^31, as their weights sum to
# no more than one
BITS = 30
LIMBS, LIMB_BITS, FRACTION_BITS = 8, 16, 48  # an exact word: 80 bits before the point, 48 behind it
EXACT_LIMIT = 2.0 ** (LIMBS * LIMB_BITS - FRACTION_BITS - 1) / 2**16  # of one participant's word
_PIECE = 1 << 16  # elements computed at a time, in the cache
_COLUMNS = 1 << 15  # of the words that `check_word` sees as a matrix

Stream = Callable[[np.ndarray], None]  # fills [n] uint32 with random bits


def encode(values: np.ndarray, span: float, random: Stream, out: np.ndarray) -> int:
    """Write the fixed-point words of `values` [n] float32 into `out` [n] uint32.

    Args:
        span: what the largest word stands for; 0: all words are zero.

    Returns:
        How many values were beyond ±span and were cut, or are no numbers and count as zero.
    """
    if not span:
        out[:] = 0
        return int(np.count_nonzero(values))
    scale = _scale(span)
    cut = 0
    limit = np.float32(2.0**BITS - 128)  # float32 has no integer closer below 2^30 + a half
    most = min(_PIECE, len(values))
    scaled = np.empty(most, np.float32)
    noise = np.empty(most, np.float32)
    bits = np.empty(-(-most // 2), np.uint32)
    for start in range(0, len(values), _PIECE):
        n = min(_PIECE, len(values) - start)
        x = scaled[:n]
        u = noise[:n]
        b = bits[: -(-n // 2)]
        with np.errstate(over="ignore"):
            np.multiply(values[start : start + n], scale, out=x)
        if not (x.max() <= limit and x.min() >= -limit):
            cut += int(np.count_nonzero(~(np.abs(x) <= limit)))
            np.clip(x, -limit, limit, out=x)
            x[~np.isfinite(values[start : start + n])] = 0
        random(b)
        np.multiply(b.view(np.uint16)[:n], np.float32(2.0**-16), out=u)
        np.add(x, u, out=x)
        np.floor(x, out=x)
        np.copyto(out[start : start + n].view(np.int32), x, casting="unsafe")
    return cut


def decode(words: np.ndarray, span: float, out: np.ndarray) -> None:
    """Write the sums of fixed-point words [n] uint32 into `out` [n], rounded once. span: as they were encoded
    with.
    """
    unit = 1.0 / float(_scale(span)) if span else 0.0
    for start in range(0, len(words), _PIECE):
        piece = words[start : start + _PIECE].view(np.int32)
        np.multiply(piece, unit, out=out[start : start + _PIECE], dtype=np.float64, casting="same_kind")


def _scale(span: float) -> np.float32:
    """Words a unit of values; of one precision for both directions, else a sum would be wrong by its
    rounding.
    """
    return np.float32(2.0**BITS / span)


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
        fixed = (
            round(mantissa * 2**FRACTION_BITS / denominator)
            if denominator > 2**FRACTION_BITS
            else mantissa * (2**FRACTION_BITS // denominator)
        )
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
    """A random linear function of [n] uint32, words taken as signed, modulo 2^64: row i of _COLUMNS words
    times a 32-bit factor of its own; of the rows' sum, column j times a 64-bit factor of its own.

    Of two vectors that differ, fewer than one in 2^27 choices of factors give the same. For a difference d =
    2^k * odd, k < 32, in some row, the column's difference f * d + rest is divisible by 2^(31 + i) for no
    more than one in 2^i factors f; one that is divisible by no more than that vanishes for one in 2^(33 - i)
    of the factors of columns. That is 2^-33 for each i from 0 to 32, and 2^-32 for a column that does not
    differ at all.
    """
    rows = np.empty(-(-len(words) // _COLUMNS), np.uint32)
    columns = np.empty(2 * _COLUMNS, np.uint32)
    factors(rows)
    factors(columns)
    total = np.zeros(_COLUMNS, np.int64)
    product = np.empty(_COLUMNS, np.int64)
    for i, factor in enumerate(rows.astype(np.int64)):
        piece = words[i * _COLUMNS : (i + 1) * _COLUMNS].view(np.int32)
        np.multiply(piece, factor, out=product[: len(piece)])
        total[: len(piece)] += product[: len(piece)]
    return int((total.view(np.uint64) * columns.view(np.uint64)).sum(dtype=np.uint64))
