"""The cryptographic primitives of an exchange: key agreement, key derivation, AEAD, key streams, signatures.

Every primitive comes from the `cryptography` package. This module fixes only how they are called: which
nonces, which contexts, which encodings. All keys derived here are used for one purpose and one message.
"""

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher as _Cipher
from cryptography.hazmat.primitives.ciphers import algorithms
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

KEY = 32  # bytes of a key, public or secret
DIGEST = 32  # bytes of a SHA-256 digest
TAG = 16  # bytes that an AEAD adds
SIGNATURE = 64  # bytes of an Ed25519 signature
BLOCK = 1 << 16  # 32-bit integers of a key stream that are made at a time: they fit in the cache
_ZEROS = memoryview(bytes(4 * BLOCK))
# A fixed nonce is safe because every AEAD key is derived for, and seals, exactly one message.
_NONCE = bytes(12)

_SHORT = 1 << 12  # bytes up to which joining is cheaper than a call
_THREAD = threading.local()

Bytes = bytes | bytearray | memoryview
# Writes the next block of a key stream. Args: as many zeros as bytes are wanted, 4 * BLOCK except at the end
# of the stream; and where they go, with room for TAG more bytes, which are undefined afterwards.
WriteBlock = Callable[[memoryview, memoryview], object]
Combine = Callable[
    [np.ndarray, np.ndarray, np.ndarray], object
]  # as np.add: the third array takes the result


class AuthenticationError(Exception):
    """A ciphertext, signature or public key that is not what its sender claims it is."""


def digest(*parts: Bytes) -> bytes:
    """Return the SHA-256 digest of several byte strings.

    Each is preceded by its length (8 bytes, big-endian), so no two different lists hash the same bytes.
    """
    state = Hash(SHA256())
    short: list[Bytes] = []  # that are still to be hashed: one call for many of them
    for part in parts:
        short.append(len(part).to_bytes(8, "big"))
        if len(part) <= _SHORT:
            short.append(part)
            continue
        state.update(b"".join(short))
        state.update(part)
        short.clear()
    state.update(b"".join(short))
    return state.finalize()


def derive_key(secret: bytes, *context: bytes, length: int = KEY) -> bytes:
    """Return a key for one purpose (HKDF-SHA256, RFC 5869, no salt, `digest(*context)` as info)."""
    return HKDF(SHA256(), length, None, digest(*context)).derive(secret)


def public_bytes(private: X25519PrivateKey | Ed25519PrivateKey) -> bytes:
    """Return the public key of a private key: 32 bytes."""
    return private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def shared_secret(private: X25519PrivateKey, public: bytes) -> bytes:
    """Return the secret shared with whoever has the private key of `public` (X25519, RFC 7748).

    Raises:
        AuthenticationError: `public` is a point of small order, with which everybody would know the secret.
    """
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise AuthenticationError("a public key of small order") from error


def check_signature(public: bytes, signature: bytes, message: bytes) -> None:
    """Verify an Ed25519 signature (RFC 8032).

    Raises:
        AuthenticationError: it is not a signature of the message by this key.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError) as error:
        raise AuthenticationError("an invalid signature") from error


def keyed_digest(key: bytes, content: Bytes) -> bytes:
    """Return the AES-128-GMAC of a content under a key that is used for nothing else: 16 bytes.

    Two different contents of n bytes, fixed before the key was drawn, have the same one with a chance of at
    most (n / 16 + 2) / 2^128. It is some eight times as fast as SHA-256, and no digest for whoever knows the
    key.
    """
    return AESGCM(key[:16]).encrypt(_NONCE, b"", content)


class Cipher(Protocol):
    """An AEAD and the key stream of the same block function.

    Attributes:
        name: as in `routing.cipher`. key_bytes: how much of a 32-byte key the AEAD uses.
        aead: the AEAD's class in the `cryptography` package.
    """

    name: str
    key_bytes: int
    aead: type[AESGCM] | type[ChaCha20Poly1305]

    @staticmethod
    def key_stream(key: bytes, number: int) -> WriteBlock:
        """Return what writes one of the key's streams, block by block.

        Args:
            number: which stream, from 0 to 2^32 - 1. Streams of one key never overlap.
        """
        ...


class AesGcm:
    """AES-128-GCM: the faster one on processors with AES instructions."""

    name = "aes-128-gcm"
    key_bytes = 16
    aead: type[AESGCM] | type[ChaCha20Poly1305] = AESGCM

    @staticmethod
    def key_stream(key: bytes, number: int) -> WriteBlock:
        """Return AES-128 in counter mode, made by encrypting zeros with GCM; the tag is not used.

        The package's GCM uses wide vector instructions where its counter mode does not. The nonce of block i
        is the stream's number (64 bits), then i (32 bits).
        """
        encrypt_into = AESGCM(key[:16]).encrypt_into
        nonces = (i.to_bytes(12, "big") for i in itertools.count(number << 32))

        def write_block(zeros: memoryview, out: memoryview) -> None:
            encrypt_into(next(nonces), zeros, None, out)

        return write_block


class ChaCha20:
    """ChaCha20-Poly1305 (RFC 8439): the faster one on processors without AES instructions."""

    name = "chacha20-poly1305"
    key_bytes = 32
    aead: type[AESGCM] | type[ChaCha20Poly1305] = ChaCha20Poly1305

    @staticmethod
    def key_stream(key: bytes, number: int) -> WriteBlock:
        """Return the ChaCha20 key stream with the stream's number as nonce, from block counter 0 on."""
        nonce = (0).to_bytes(4, "little") + number.to_bytes(12, "big")
        return _Cipher(algorithms.ChaCha20(key, nonce), None).encryptor().update_into


CIPHERS: dict[str, type[Cipher]] = {cipher.name: cipher for cipher in (AesGcm, ChaCha20)}


def combine_key_streams(
    cipher: type[Cipher], number: int, integers: np.ndarray, streams: Sequence[tuple[bytes, Combine]]
) -> None:
    """Combine `integers` [n] uint32 with the streams of several keys, in place.

    A block is combined with all streams before the next one is looked at, so that it stays in the cache.

    Args:
        number: of the streams, the same for all keys.
        streams: (key, np.add or np.subtract) of each.
    """
    writers = [(cipher.key_stream(key, number), combine) for key, combine in streams]
    memory = _block_memory()
    for start in range(0, len(integers), BLOCK):
        piece = integers[start : start + BLOCK]
        block = memory[: piece.nbytes].view(np.uint32)
        out = memory[: piece.nbytes + TAG].data
        zeros = _ZEROS[: piece.nbytes]
        for write_block, combine in writers:
            write_block(zeros, out)
            combine(piece, block, piece)


def fill_key_stream(cipher: type[Cipher], key: bytes, number: int, out: np.ndarray) -> None:
    """Write the key's stream of this number into `out` [n] uint32."""
    write_block = cipher.key_stream(key, number)
    memory = _block_memory()
    for start in range(0, len(out), BLOCK):
        piece = out[start : start + BLOCK]
        write_block(_ZEROS[: piece.nbytes], memory[: piece.nbytes + TAG].data)
        piece[:] = memory[: piece.nbytes].view(np.uint32)


def _block_memory() -> np.ndarray:
    """Return memory of this thread for one block and a tag: [4 * BLOCK + TAG] uint8."""
    if not hasattr(_THREAD, "block"):
        _THREAD.block = np.empty(4 * BLOCK + TAG, np.uint8)
    return _THREAD.block


def seal(cipher: type[Cipher], key: bytes, plaintext: Bytes, associated_data: bytes) -> bytes:
    """Return the AEAD ciphertext, TAG bytes longer than the plaintext. The key must seal nothing else."""
    return cipher.aead(key[: cipher.key_bytes]).encrypt(_NONCE, plaintext, associated_data)


def seal_into(
    cipher: type[Cipher], key: bytes, plaintext: np.ndarray, associated_data: bytes, out: np.ndarray
) -> None:
    """Seal `plaintext` [n] uint8 into `out` [n + TAG] uint8, as `seal` does."""
    cipher.aead(key[: cipher.key_bytes]).encrypt_into(_NONCE, plaintext.data, associated_data, out.data)


def open_sealed(cipher: type[Cipher], key: bytes, sealed: bytes, associated_data: bytes) -> bytes:
    """Return the plaintext of `seal`.

    Raises:
        AuthenticationError: not sealed with this key and associated data, or changed since.
    """
    try:
        return cipher.aead(key[: cipher.key_bytes]).decrypt(_NONCE, sealed, associated_data)
    except InvalidTag as error:
        raise AuthenticationError("a ciphertext that does not open") from error


def open_into(
    cipher: type[Cipher], key: bytes, sealed: np.ndarray, associated_data: bytes, out: np.ndarray
) -> None:
    """Open `sealed` [n + TAG] uint8 into `out` [n] uint8.

    Raises:
        AuthenticationError: as of `open_sealed`; the content of `out` is undefined then.
    """
    aead = cipher.aead(key[: cipher.key_bytes])
    try:
        aead.decrypt_into(_NONCE, sealed.data, associated_data, out.data)
    except InvalidTag as error:
        raise AuthenticationError("a ciphertext that does not open") from error
