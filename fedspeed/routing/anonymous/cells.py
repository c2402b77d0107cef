"""Cells: one member's chunk, sealed in onion layers to the members of its path.

The core of a cell is a random serial and the chunk's (masked) integers. It is sealed to the chunk's owner,
and around that once more for each relay, from the last one to the first. A relay opens the outermost layer
only, so it learns the member before it and the member after it, and nothing else. All cells of a hop have the
same size, and no bytes of a cell appear again in the next hop. (After Outfox: Rial, Piotrowska and Halpin,
2024. A fixed number of hops needs neither padding nor a packet header.)

A layer is a fresh X25519 public key and an AEAD ciphertext. Its key comes from the shared secret of that key
and the receiver's onion key, by HKDF under b"cell", the attempt's context, the hop, the chunk and the public
key; the context is the associated data too. So a layer opens only in its attempt, hop and chunk.

The cell of hop h is what travels in hop h, hop 0 being from its source to the first member of the path. In
this module the core counts as the cell of hop relays + 1.
"""

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedspeed.routing.anonymous.crypto import (
    KEY,
    TAG,
    AuthenticationError,
    Cipher,
    derive_key,
    open_into,
    public_bytes,
    seal_into,
    shared_secret,
)
from fedspeed.routing.anonymous.paths import PathPlan
from fedspeed.routing.buffer_pool import BUFFERS

SERIAL = 16  # random bytes by which a source, and nobody else, recognises its own cell
LAYER = KEY + TAG  # bytes that each layer adds: a public key and an AEAD tag


def size(plan: PathPlan, hop: int) -> int:
    """Return the bytes of a cell of a hop."""
    return SERIAL + 4 * plan.chunk_length + LAYER * (plan.relays + 1 - hop)


def empty_cells(plan: PathPlan, hop: int, count: int) -> np.ndarray:
    """Return memory for cells of a hop: [count, size] uint8, content undefined."""
    return BUFFERS.take(count, size(plan, hop))


def integers_of(core: np.ndarray) -> np.ndarray:
    """Return a view of the integers in a core: [chunk_length] uint32."""
    return core[SERIAL:].view(np.uint32)


def serial_of(core: np.ndarray) -> bytes:
    """Return the serial of a core."""
    return core[:SERIAL].tobytes()


def build(
    cipher: type[Cipher],
    context: bytes,
    plan: PathPlan,
    chunk: int,
    onion_keys: Sequence[bytes],
    *,
    core: np.ndarray,
    ephemeral: Sequence[X25519PrivateKey],
    out: np.ndarray,
) -> None:
    """Seal a core in all its layers, as its source sends it, into `out` [size of hop 0] uint8.

    Args:
        context: of the attempt, beacon included; the cell opens nowhere else.
        onion_keys: public onion keys of all members.
        core: [size of hop relays + 1] uint8: the serial, then the integers.
        ephemeral: a fresh key for each layer, from the first relay's to the owner's.
    """
    inside = core
    for hop in range(plan.relays, -1, -1):
        public = public_bytes(ephemeral[hop])
        secret = shared_secret(ephemeral[hop], onion_keys[plan.paths[chunk][hop]])
        cell = empty_cells(plan, hop, 1)[0] if hop else out
        cell[:KEY] = np.frombuffer(public, np.uint8)
        seal_into(cipher, _layer_key(secret, context, hop, chunk, public), inside, context, cell[KEY:])
        inside = cell


def open_layer(
    cipher: type[Cipher],
    context: bytes,
    hop: int,
    chunk: int,
    private: X25519PrivateKey,
    *,
    cell: np.ndarray,
    out: np.ndarray,
) -> None:
    """Open the outermost layer of a cell that arrived in a hop, into `out` [size of the next hop] uint8.

    Args:
        private: the receiver's onion key.

    Raises:
        AuthenticationError: the layer was not sealed to this key for this attempt, hop and chunk, or was
            changed since; `out` is undefined then.
    """
    public = cell[:KEY].tobytes()
    key = _layer_key(shared_secret(private, public), context, hop, chunk, public)
    open_into(cipher, key, cell[KEY:], context, out)


def open_all(
    cipher: type[Cipher],
    context: bytes,
    plan: PathPlan,
    chunk: int,
    onion_keys: Sequence[bytes],
    *,
    cell: np.ndarray,
    ephemeral: Sequence[X25519PrivateKey],
) -> list[np.ndarray]:
    """Return a cell as it is in every hop, its core last, opened with the keys that its source reveals.

    Args:
        cell: as its source sent it. ephemeral: the source's private key of each layer.

    Raises:
        AuthenticationError: the source has not built the cell as the protocol demands.
    """
    stages = [cell]
    for hop in range(plan.relays + 1):
        public = public_bytes(ephemeral[hop])
        secret = shared_secret(ephemeral[hop], onion_keys[plan.paths[chunk][hop]])
        inside = empty_cells(plan, hop + 1, 1)[0]
        if stages[-1][:KEY].tobytes() != public:
            raise AuthenticationError("a layer under another key than its source reveals")
        key = _layer_key(secret, context, hop, chunk, public)
        open_into(cipher, key, stages[-1][KEY:], context, inside)
        stages.append(inside)
    return stages


def _layer_key(secret: bytes, context: bytes, hop: int, chunk: int, public: bytes) -> bytes:
    position = (hop.to_bytes(4, "big"), chunk.to_bytes(4, "big"))
    return derive_key(secret, b"cell", context, *position, public)
