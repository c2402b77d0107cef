"""The cryptography of a round, each primitive from the `cryptography` package: key agreement, derivation,
sealing, key streams, signatures.
"""

from collections.abc import Iterator

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

KEY, TAG, SIGNATURE = 32, 16, 64  # bytes
BLOCK = 1 << 16  # words of a key stream that are made at a time, and stay in the cache
_ZEROS = memoryview(bytes(4 * BLOCK))
_NONCE = bytes(12)  # every key seals once


class Refused(Exception):
    """Something does not open, or is not signed by whom it should be."""


def digest(*parts: bytes) -> bytes:
    """SHA-256 of parts, each with its length before it, so that no two lists have the same bytes."""
    state = Hash(SHA256())
    for part in parts:
        state.update(len(part).to_bytes(8, "big"))
        state.update(part)
    return state.finalize()


def derive_key(secret: bytes, *context: bytes, length: int = KEY) -> bytes:
    """A key for one purpose (HKDF-SHA256, RFC 5869)."""
    return HKDF(SHA256(), length, None, digest(*context)).derive(secret)


def public_bytes(private: X25519PrivateKey | Ed25519PrivateKey) -> bytes:
    return private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def agree(private: X25519PrivateKey, public: bytes) -> bytes:
    """The secret shared with the holder of `public` (X25519, RFC 7748).

    Raises:
        Refused: a point of small order, which would make the secret known to everyone.
    """
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise Refused("a public key that agrees on nothing") from error


def check_signature(public: bytes, signature: bytes, message: bytes) -> None:
    """Ed25519 (RFC 8032).

    Raises:
        Refused: it is not the key's signature of the message.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError) as error:
        raise Refused("a signature that does not hold") from error


class AesGcm:
    """AES-128: the faster where processors have instructions for it."""

    name = "aes-128-gcm"
    key_bytes = 16
    aead = AESGCM

    @staticmethod
    def blocks(key: bytes, part: int, words: int) -> Iterator[np.ndarray]:
        """AES-128 in counter mode, a block at a time, each in place of the one before. Encrypting zeros with
        GCM gives just that, and is the fastest way to it; the tag is thrown away.
        """
        cipher = AESGCM(key[:16])
        room = np.empty(4 * min(BLOCK, words) + TAG, np.uint8)
        for i, start in enumerate(range(0, words, BLOCK)):
            count = min(BLOCK, words - start)
            cipher.encrypt_into(
                (part << 32 | i).to_bytes(12, "big"), _ZEROS[: 4 * count], None, room[: 4 * count + TAG]
            )
            yield room[: 4 * count].view(np.uint32)


class ChaCha20:
    """ChaCha20 and Poly1305 (RFC 8439): the faster elsewhere, and as fast on every processor."""

    name = "chacha20-poly1305"
    key_bytes = 32
    aead = ChaCha20Poly1305

    @staticmethod
    def blocks(key: bytes, part: int, words: int) -> Iterator[np.ndarray]:
        encryptor = _Cipher(
            algorithms.ChaCha20(key, (0).to_bytes(4, "little") + part.to_bytes(12, "big")), None
        ).encryptor()
        room = np.empty(4 * min(BLOCK, words), np.uint8)
        for start in range(0, words, BLOCK):
            count = min(BLOCK, words - start)
            encryptor.update_into(_ZEROS[: 4 * count], room[: 4 * count])
            yield room[: 4 * count].view(np.uint32)


def fill_key_stream(cipher, key: bytes, part: int, out: np.ndarray) -> None:
    """Fill `out` [n] uint32 with a key stream; every part of a key is a stream of its own."""
    for i, block in enumerate(cipher.blocks(key, part, len(out))):
        out[i * BLOCK : i * BLOCK + len(block)] = block


CIPHERS = {cipher.name: cipher for cipher in (AesGcm, ChaCha20)}


def seal(cipher, key: bytes, plain, context: bytes) -> bytes:
    """AEAD with a key that is used for nothing else; `TAG` bytes longer than `plain`."""
    return cipher.aead(key[: cipher.key_bytes]).encrypt(_NONCE, plain, context)


def seal_into(cipher, key: bytes, plain, context: bytes, out) -> None:
    """`seal`, into a buffer of the right size."""
    cipher.aead(key[: cipher.key_bytes]).encrypt_into(_NONCE, plain, context, out)


def open_sealed(cipher, key: bytes, sealed, context: bytes) -> bytes:
    """Raises: Refused: not sealed with this key for this context, or changed since."""
    plain = bytearray(max(0, len(sealed) - TAG))
    open_into(cipher, key, sealed, context, plain)
    return bytes(plain)


def open_into(cipher, key: bytes, sealed, context: bytes, out) -> None:
    """`open_sealed`, into a buffer of the right size, whose content is undefined where it does not open."""
    try:
        cipher.aead(key[: cipher.key_bytes]).decrypt_into(_NONCE, sealed, context, out)
    except InvalidTag as error:
        raise Refused("a cell that does not open") from error
