"""The cryptographic primitives against the test vectors of their standards, and what is built of them: key
streams, shares, integers, paths, masks.
"""

import hashlib
import hmac
from collections import Counter
from math import comb

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedspeed.routing.anonymous import cells, crypto, paths, ring
from fedspeed.routing.anonymous.crypto import (
    CIPHERS,
    AesGcm,
    AuthenticationError,
    ChaCha20,
    check_signature,
    derive_key,
    digest,
    open_sealed,
    public_bytes,
    seal,
    shared_secret,
)
from fedspeed.routing.anonymous.lockstep import play
from fedspeed.routing.anonymous.masks import Masks, remove_self_masks
from fedspeed.routing.anonymous.mix_node import secret_order
from tests.routing.anonymous.parties import Parties

hexed = bytes.fromhex


def stream(cipher, key, number, nbytes) -> bytes:
    """Return the beginning of one of a key's streams."""
    out = np.empty(nbytes // 4, np.uint32)
    crypto.fill_key_stream(cipher, key, number, out)
    return out.tobytes()


def test_rfc_8439_key_stream():
    assert stream(ChaCha20, bytes(32), 0, 64) == hexed(
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )
    assert stream(ChaCha20, bytes(32), 2, 64) == hexed(
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d"
    )


def test_rfc_8439_sealing():
    sealed = ChaCha20.aead(bytes(range(0x80, 0xA0))).encrypt(
        hexed("070000004041424344454647"),
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the "
        b"future, sunscreen would be it.",
        hexed("50515253c0c1c2c3c4c5c6c7"),
    )
    assert sealed[-16:] == hexed("1ae10b594f09e26a7e902ecbd0600691") and sealed[:16] == hexed(
        "d31a8d34648e60db7b86afbc53ef7ec2"
    )


def test_rfc_5869_derivation():
    okm = HKDF(SHA256(), 42, None, b"").derive(b"\x0b" * 22)
    assert okm == hexed(
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    )
    info = digest(b"one", b"two")
    extracted = hmac.digest(bytes(32), b"secret", hashlib.sha256)
    assert derive_key(b"secret", b"one", b"two") == hmac.digest(extracted, info + b"\x01", hashlib.sha256)
    assert digest(b"ab", b"c") != digest(b"a", b"bc")


def test_rfc_7748_agreement():
    bob = X25519PrivateKey.from_private_bytes(
        hexed("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    )
    alice = hexed("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    assert public_bytes(bob) == hexed("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
    assert shared_secret(bob, alice) == hexed(
        "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    )
    with pytest.raises(AuthenticationError):
        shared_secret(bob, bytes(32))


def test_rfc_8032_signatures():
    private = Ed25519PrivateKey.from_private_bytes(
        hexed("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    )
    public = hexed("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    signature = hexed(
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
    )
    assert public_bytes(private) == public and private.sign(b"") == signature
    check_signature(public, signature, b"")
    for wrong in ((public, signature, b"x"), (public, bytes(64), b""), (bytes(32), signature, b"")):
        with pytest.raises(AuthenticationError):
            check_signature(*wrong)


@pytest.mark.parametrize("nbytes", [4, 64, (1 << 18) - 4, (1 << 18) + 20, 1 << 20])
def test_aes_stream_is_counter_mode(nbytes):
    """Each block of 256 KiB has a nonce of its own, and GCM counts from 2 on."""
    key = b"k" * 32
    expected = b""
    for i in range(-(-nbytes // (1 << 18))):
        counter = (7 << 32 | i).to_bytes(12, "big") + (2).to_bytes(4, "big")
        expected += Cipher(algorithms.AES(key[:16]), modes.CTR(counter)).encryptor().update(bytes(1 << 18))
    assert stream(AesGcm, key, 7, nbytes) == expected[:nbytes]


@pytest.mark.parametrize("cipher", CIPHERS.values(), ids=lambda c: c.name)
def test_the_streams_of_a_key_do_not_overlap(cipher):
    streams = [stream(cipher, b"k" * 32, number, 1 << 12) for number in range(20)]
    blocks = [one[start : start + 16] for one in streams for start in range(0, len(one), 16)]
    assert len(set(blocks)) == len(blocks)
    # A shorter stream is the beginning of a longer one.
    assert stream(cipher, b"k" * 32, 3, 1 << 12)[: 1 << 11] == stream(cipher, b"k" * 32, 3, 1 << 11)


@pytest.mark.parametrize("cipher", CIPHERS.values(), ids=lambda c: c.name)
def test_what_is_sealed_opens_with_its_key_and_context_only(cipher):
    sealed = seal(cipher, b"k" * 32, b"text", b"here")
    assert open_sealed(cipher, b"k" * 32, sealed, b"here") == b"text"
    for key, data, context in (
        (b"j" * 32, sealed, b"here"),
        (b"k" * 32, sealed, b"there"),
        (b"k" * 32, sealed[:-1] + b"?", b"here"),
    ):
        with pytest.raises(AuthenticationError):
            open_sealed(cipher, key, data, context)


# Integers modulo 2^32.


def noise(seed):
    random = np.random.default_rng(seed)
    return lambda out: out.__setitem__(slice(None), random.integers(0, 2**32, len(out), dtype=np.uint32))


@pytest.mark.parametrize("n", [3, 5, 9, 16, 64])
def test_the_sum_is_float64_fedavg_within_the_quantisation(n):
    random = np.random.default_rng(n)
    length = 70_001
    weights = random.integers(1, 1000, n).astype(float)
    updates = [random.normal(size=length).astype(np.float32) * 0.01 for _ in range(n)]
    total = np.zeros(length, np.uint32)
    bound = 0.05 * 64
    whole = weights.sum()
    for i in range(n):
        out = np.empty(length, np.uint32)
        assert ring.encode((updates[i] * np.float32(weights[i] / whole)), bound, noise(i), out) == 0
        total += out
    exact = sum(w * u.astype(np.float64) for w, u in zip(weights, updates)) / whole
    unit = bound / 2**ring.BITS
    decoded = np.empty(length)
    ring.decode(total, bound, decoded)
    assert np.abs(decoded - exact).max() <= n * (unit + 2**-23 * 0.05)


def test_rounding_has_no_bias():
    values = np.full(200_000, 0.3, np.float32)
    out = np.empty(200_000, np.uint32)
    ring.encode(values, 2.0**ring.BITS, noise(1), out)
    assert abs(out.mean() - 0.3) < 4 * np.sqrt(0.21 / 200_000) and set(out.tolist()) == {0, 1}
    ring.encode(-values, 2.0**ring.BITS, noise(1), out)
    assert abs(out.view(np.int32).mean() + 0.3) < 4 * np.sqrt(0.21 / 200_000)


def test_values_above_the_bound_are_clipped_and_counted():
    out = np.empty(4, np.uint32)
    assert ring.encode(np.array([0.5, 2.0, -3.0, 1.0], np.float32), 1.0, noise(0), out) == 3
    decoded = np.empty(4, np.float32)
    ring.decode(out, 1.0, decoded)
    np.testing.assert_allclose(decoded, [0.5, 1.0, -1.0, 1.0], atol=1e-6)


def test_exact_values():
    random = np.random.default_rng(0)
    columns = [random.normal(size=50) * 10.0 ** random.integers(-9, 9, 50) for _ in range(64)]
    columns[0][:4] = [0.0, 2**40, -(2**40) - 0.5, 1e9 / 3]
    total = np.sum([ring.encode_exact(c) for c in columns], axis=0, dtype=np.uint32)
    exact = np.sum([np.round(c * 2**48) / 2**48 for c in columns], axis=0)
    np.testing.assert_allclose(ring.decode_exact(total), exact, rtol=1e-14, atol=64 * 2.0**-48)
    for bad in (np.nan, np.inf, 1e300):
        with pytest.raises(ValueError, match="must be finite"):
            ring.encode_exact(np.array([bad]))


# Paths.


@pytest.mark.parametrize("members,relays", [(3, 2), (5, 0), (9, 2), (16, 3), (1, 0)])
def test_paths_are_balanced_and_their_members_differ(members, relays):
    plan = paths.draw_paths(b"beacon", members, 5_000, relays, 64)
    assert plan.chunks % members == 0 and plan.chunks * plan.chunk_length >= 5_000
    for path in plan.paths:
        assert len(set(path)) == relays + 1
    for hop in range(relays + 1):
        assert set(Counter(path[hop] for path in plan.paths).values()) == {plan.chunks // members}
        for member in range(members):
            arriving = [plan.chunks_between(hop, sender, member) for sender in range(members)]
            assert set().union(*arriving) == set(plan.chunks_at(hop, member))


def test_paths_depend_on_the_beacon():
    one, same, other = (paths.draw_paths(b, 9, 10_000, 2, 64).paths for b in (b"a", b"a", b"b"))
    assert one == same and sum(x == y for x, y in zip(one, other)) < len(one) // 3


@pytest.mark.parametrize("members,corrupt,relays", [(8, 2, 2), (9, 3, 2), (9, 3, 3), (16, 5, 3)])
def test_paths_are_compromised_as_often_as_the_formula_says(members, corrupt, relays):
    draws = 0
    compromised = 0
    for beacon in range(1_500):
        for path in paths.draw_paths(beacon.to_bytes(4, "big"), members, 2 * members, relays, 1).paths:
            draws += 1
            compromised += all(member < corrupt for member in path[:-1])
    p = comb(corrupt, relays) / comb(members, relays)
    # The paths of one group are not independent, so only draws / members count.
    assert abs(compromised / draws - p) < 5 * np.sqrt(p * (1 - p) / draws * members)


def test_orders_are_uniform():
    counts = Counter(tuple(secret_order(3)) for _ in range(6_000))
    chi_square = sum((count - 1000) ** 2 / 1000 for count in counts.values())
    assert len(counts) == 6 and chi_square < 25  # 5 degrees of freedom, p = 1e-4


# Masks and cells.


def test_masks_cancel_in_the_sum_of_all_and_only_there():
    private = [X25519PrivateKey.generate() for _ in range(4)]
    keys = [public_bytes(p) for p in private]
    self_secrets = [bytes([i]) * 32 for i in range(4)]
    masks = [
        Masks(AesGcm, b"context", i, private=private[i], keys=keys, self_secret=self_secrets[i])
        for i in range(4)
    ]
    for i in range(4):
        for j in range(i):
            assert masks[i].pairwise_keys[j] == masks[j].pairwise_keys[i]
    vectors = np.zeros((4, 1000), np.uint32)
    for i in range(4):
        masks[i].apply(5, vectors[i])
    total = vectors.sum(axis=0, dtype=np.uint32)
    assert len(set(total.tolist())) > 990, "the self masks are still there"
    remove_self_masks(AesGcm, dict(enumerate(self_secrets)), 5, total)
    assert not total.any()
    three = vectors[:3].sum(axis=0, dtype=np.uint32)
    remove_self_masks(AesGcm, dict(enumerate(self_secrets[:3])), 5, three)
    assert len(set(three.tolist())) > 990, "the pairwise masks with an absent member remain"


def test_pairwise_keys_do_not_follow_from_what_is_sent():
    """No 32 bytes of any message give a pairwise key, neither themselves nor by the protocol's derivation."""
    parties = Parties(3)
    seen = []
    members = parties.attempt()
    play(members, lambda phase, messages: seen.extend(messages.values()))
    keys = {key for member in members for key in member.masks.pairwise_keys.values()}
    public = {text[start : start + 32] for text in seen for start in range(0, len(text) - 31, 4)} | {
        members[0].context,
        members[0].parameters.context,
    }
    candidates = {
        derive_key(p, b"mask", members[0].context, i.to_bytes(4, "big"), j.to_bytes(4, "big"))
        for p in public
        for i in range(3)
        for j in range(i, 3)
    }
    assert len(keys) == 3 and not keys & (candidates | public)


def test_masked_cells_look_random():
    """The bytes of a cell whose integers are all zero, as its owner sees them, are uniform (chi-square)."""
    parties = Parties(3, 30_000, chunk_length=4096)
    parties.integers = [own * 0 for own in parties.integers]
    members = parties.attempt()
    play(members)
    plan = members[0].plan
    cores = cells.empty_cells(plan, plan.relays + 1, 3)
    members[0].open_layers(plan.relays, plan.owned(0)[0], cores)
    counts = np.bincount(cores[0, cells.SERIAL :], minlength=256)
    expected = counts.sum() / 256
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * np.sqrt(2 * 255)
