"""The list that the owner of a chunk publishes: which cells it has summed, and the digest of the sum. Pure.

An entry is the sorted serials of the chunk's cells and the digest of the sum of their integers. The owner
signs its entries, so that it cannot deny them later.
"""

from collections.abc import Iterable

import numpy as np

from fedspeed.routing.anonymous.cells import SERIAL, integers_of, serial_of
from fedspeed.routing.anonymous.crypto import DIGEST, digest


def entry_size(members: int) -> int:
    """Return the bytes of an entry."""
    return members * SERIAL + DIGEST


def make_entry(cores: Iterable[np.ndarray], total: np.ndarray) -> bytes:
    """Return the entry of a chunk.

    Args:
        cores: of all its cells. total: [chunk_length] uint32, the sum of their integers.
    """
    return b"".join(sorted(map(serial_of, cores))) + digest(total.view(np.uint8).data)


def split_entries(text: bytes, members: int) -> list[bytes]:
    """Return the entries of an owner's list, in the order of the chunks that it owns."""
    size = entry_size(members)
    return [text[start : start + size] for start in range(0, len(text), size)]


def has_once(entry: bytes, serial: bytes) -> bool:
    """Return whether an entry lists a serial exactly once."""
    serials = entry[:-DIGEST]
    found = 0
    at = serials.find(serial)
    while at >= 0:  # one search in C: many members have as many serials in each of as many entries
        found += at % SERIAL == 0
        at = serials.find(serial, at + 1)
    return found == 1


def has_sum(entry: bytes, total: np.ndarray) -> bool:
    """Return whether an entry has the digest of this sum [chunk_length] uint32."""
    return digest(total.view(np.uint8).data) == entry[-DIGEST:]


def sum_cores(cores: Iterable[np.ndarray], out: np.ndarray) -> np.ndarray:
    """Sum the integers of cores into `out` [chunk_length] uint32, modulo 2^32, and return it."""
    out[:] = 0
    for core in cores:
        out += integers_of(core)
    return out
