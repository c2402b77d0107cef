"""Cells: a chunk of one member, sealed to its owner, and around that once more for every relay on the way, so that no station can tell where it
comes from beyond the one before. All cells of one level have the same size, and nothing in a cell repeats in the next level. (The layers follow
Outfox, Rial, Piotrowska and Halpin, 2024: a fixed number of hops needs no padding and no packet header.)
"""

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedspeed.routing.anonymous.crypto import KEY, TAG, Refused, agree, derive, open_sealed, public_of, seal_into

SERIAL = 16  # random bytes by which its source, and nobody else, knows a cell again
LAYER = KEY + TAG  # what each layer adds: a fresh public key, and the seal


def size(plan, level: int) -> int:
    """Bytes of a cell that travels hop `level`, 0 being from its source to the first station."""
    return SERIAL + 4 * plan.chunk_words + LAYER * (plan.hops + 1 - level)


def build(cipher, context: bytes, plan, chunk: int, keys: Sequence[bytes], serial: bytes, words: np.ndarray,
          ephemeral: Sequence[X25519PrivateKey]) -> bytearray:
    """The cell as its source sends it.

    Args:
        context: what the cell belongs to; it opens nowhere else.
        keys: onion keys of all members.
        words: [chunk_words] uint32.
        ephemeral: a fresh key for each layer, from the first relay to the owner.
    """
    cell = bytearray(SERIAL + words.nbytes)
    cell[:SERIAL], cell[SERIAL:] = serial, memoryview(words).cast("B")
    for level in range(plan.hops, -1, -1):
        private, inside = ephemeral[level], cell
        public, station = public_of(private), plan.stations[chunk][level]
        cell = bytearray(len(inside) + LAYER)
        cell[:KEY] = public
        seal_into(cipher, _key(agree(private, keys[station]), context, level, chunk, public), inside, context, memoryview(cell)[KEY:])
    return cell


def peel(cipher, context: bytes, level: int, chunk: int, private: X25519PrivateKey, cell) -> bytes:
    """What is inside the layer for this station.

    Raises:
        Refused: it was not sealed for this station, chunk, level and round, or was changed since.
    """
    public = bytes(cell[:KEY])
    return open_sealed(cipher, _key(agree(private, public), context, level, chunk, public), memoryview(cell)[KEY:], context)


def trace(cipher, context: bytes, plan, chunk: int, keys: Sequence[bytes], cell: bytes, ephemeral: Sequence[X25519PrivateKey]) -> list[bytes]:
    """The cell as it is at every level, and its core at the end, told from the source's own keys.

    Raises:
        Refused: the source has not built it as the protocol says.
    """
    found = [cell]
    for level in range(plan.hops + 1):
        private, station = ephemeral[level], plan.stations[chunk][level]
        if found[-1][:KEY] != public_of(private):
            raise Refused("a layer with another key than its source says")
        key = _key(agree(private, keys[station]), context, level, chunk, public_of(private))
        found.append(open_sealed(cipher, key, found[-1][KEY:], context))
    return found


def _key(shared: bytes, context: bytes, level: int, chunk: int, public: bytes) -> bytes:
    return derive(shared, b"cell", context, level.to_bytes(4, "big"), chunk.to_bytes(4, "big"), public)
