"""Cells: a chunk of one member, sealed to its owner, and around that once more for every relay on the way, so
that no station can tell where it comes from beyond the one before. All cells of one level have the same size,
and nothing in a cell repeats in the next level. (The layers follow
Outfox, Rial, Piotrowska and Halpin, 2024: a fixed number of hops needs no padding and no packet header.)
"""

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedspeed.routing.anonymous.crypto import (
    KEY,
    TAG,
    Refused,
    agree,
    derive_key,
    open_into,
    public_bytes,
    seal_into,
)
from fedspeed.routing.buffer_pool import BUFFERS

SERIAL = 16  # random bytes by which its source, and nobody else, knows a cell again
LAYER = KEY + TAG  # what each layer adds: a fresh public key, and the seal


def size(plan, level: int) -> int:
    """Bytes of a cell that travels hop `level`, 0 being from its source to the first station."""
    return SERIAL + 4 * plan.chunk_words + LAYER * (plan.hops + 1 - level)


def room(plan, level: int, count: int) -> np.ndarray:
    """[count, size] uint8, for cells of a level."""
    return BUFFERS.take(count, size(plan, level))


def words_of(core: np.ndarray) -> np.ndarray:
    """[chunk_words] uint32, the content of what is inside the last layer."""
    return core[SERIAL:].view(np.uint32)


def build(
    cipher,
    context: bytes,
    plan,
    chunk: int,
    keys: Sequence[bytes],
    *,
    core: np.ndarray,
    ephemeral: Sequence[X25519PrivateKey],
    out: np.ndarray,
) -> None:
    """The cell as its source sends it, into `out` [size of level 0] uint8.

    Args:
        context: what the cell belongs to; it opens nowhere else.
        keys: onion keys of all members.
        core: [size of level hops + 1] uint8: the serial, then the words.
        ephemeral: a fresh key for each layer, from the first relay to the owner.
    """
    inside = core
    for level in range(plan.hops, -1, -1):
        private = ephemeral[level]
        station = plan.stations[chunk][level]
        public = public_bytes(private)
        cell = room(plan, level, 1)[0] if level else out
        cell[:KEY] = np.frombuffer(public, np.uint8)
        seal_into(
            cipher,
            _key(agree(private, keys[station]), context, level, chunk, public),
            inside,
            context,
            cell[KEY:],
        )
        inside = cell


def peel(
    cipher,
    context: bytes,
    level: int,
    chunk: int,
    private: X25519PrivateKey,
    *,
    cell: np.ndarray,
    out: np.ndarray,
) -> None:
    """What is inside the layer for this station, into `out` [size of the next level] uint8.

    Raises:
        Refused: it was not sealed for this station, chunk, level and round, or was changed since; `out` is
            undefined then.
    """
    public = cell[:KEY].tobytes()
    open_into(cipher, _key(agree(private, public), context, level, chunk, public), cell[KEY:], context, out)


def trace(
    cipher,
    context: bytes,
    plan,
    chunk: int,
    keys: Sequence[bytes],
    *,
    cell: np.ndarray,
    ephemeral: Sequence[X25519PrivateKey],
) -> list[np.ndarray]:
    """The cell as it is at every level, and its core at the end, told from the source's own keys.

    Raises:
        Refused: the source has not built it as the protocol says.
    """
    found = [cell]
    for level in range(plan.hops + 1):
        private = ephemeral[level]
        station = plan.stations[chunk][level]
        public = public_bytes(private)
        inside = room(plan, level + 1, 1)[0]
        if found[-1][:KEY].tobytes() != public:
            raise Refused("a layer with another key than its source says")
        open_into(
            cipher,
            _key(agree(private, keys[station]), context, level, chunk, public),
            found[-1][KEY:],
            context,
            inside,
        )
        found.append(inside)
    return found


def _key(shared: bytes, context: bytes, level: int, chunk: int, public: bytes) -> bytes:
    return derive_key(shared, b"cell", context, level.to_bytes(4, "big"), chunk.to_bytes(4, "big"), public)
