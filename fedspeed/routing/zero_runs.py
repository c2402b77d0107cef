"""Lossless encoding of a vector with runs of zeros: where the other values are, and the values.

[count uint32][count times (start uint32, length uint32)][the values of all stretches]
"""

import numpy as np

from fedspeed.errors import FedSpeedError

_PLACE = np.dtype("<u4")
_PAIR_BYTES = 2 * _PLACE.itemsize
_MOST_USED = 0.9  # share of nonzero values from which encoding is not tried
_SCATTER = 64  # stretches; more than these, and than one in as many values, would take long


def encode(values: np.ndarray) -> np.ndarray:
    """Return the encoding [n] uint8 of a vector; the vector's own bytes where the encoding is not shorter.

    Only values whose bits are all zero are left out, so that -0.0 is kept.

    Args:
        values: [k] float32 or float64.
    """
    plain = np.ascontiguousarray(values).view(np.uint8)
    used = values.view(f"<u{values.itemsize}") != 0
    if np.count_nonzero(used) > _MOST_USED * used.size or used.size > np.iinfo(_PLACE).max:
        return plain
    edges = np.flatnonzero(np.diff(used, prepend=False, append=False))
    starts = edges[::2]
    ends = edges[1::2]
    # A gap that is shorter than the pair of numbers that it takes to leave it out stays.
    is_gap = (starts[1:] - ends[:-1]) * values.itemsize > _PAIR_BYTES
    starts = starts[np.concatenate([[True], is_gap])] if starts.size else starts
    ends = ends[np.concatenate([is_gap, [True]])] if ends.size else ends
    if starts.size > max(_SCATTER, used.size // _SCATTER):
        return plain
    size = _PLACE.itemsize + starts.size * _PAIR_BYTES + int((ends - starts).sum()) * values.itemsize
    if size >= plain.size:
        return plain
    places = np.concatenate([[starts.size], np.stack([starts, ends - starts], axis=1).reshape(-1)])
    kept = [values[start:end] for start, end in zip(starts.tolist(), ends.tolist())]
    return np.concatenate([places.astype(_PLACE).view(np.uint8), *(part.view(np.uint8) for part in kept)])


def decode(data: np.ndarray, length: int, dtype: np.dtype) -> np.ndarray:
    """Return the vector [length] of an encoding, with the same bits.

    Args:
        data: [n] uint8, from a peer.

    Raises:
        FedSpeedError: it is no encoding of such a vector.
    """
    if data.size == length * dtype.itemsize:
        return data.view(dtype)
    head = _PLACE.itemsize
    count = int(data[:head].view(_PLACE)[0]) if data.size >= head else data.size
    body = head + count * _PAIR_BYTES
    if body > data.size:
        raise FedSpeedError(f"a participant sends {data.size} bytes that claim {count} stretches of values")
    starts, lengths = data[head:body].view(_PLACE).astype(np.int64).reshape(-1, 2).T
    ends = starts + lengths
    is_ordered = bool((starts[1:] >= ends[:-1]).all()) and bool((ends <= length).all())
    if not is_ordered or int(lengths.sum()) * dtype.itemsize != data.size - body:
        raise FedSpeedError(
            f"a participant sends {data.size} bytes whose stretches of values do not fit into {length} values"
        )
    vector = np.zeros(length, dtype)
    values = data[body:].view(dtype)
    taken = 0
    for start, end in zip(starts.tolist(), ends.tolist()):
        vector[start:end] = values[taken : taken + end - start]
        taken += end - start
    return vector
