"""Cards and rosters that somebody else wrote: what is wrong with them is one message that names the file."""

import datetime
import json

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from fedspeed.cli import main
from fedspeed.errors import FedSpeedError
from fedspeed.routing import identity
from tests.routing.sites import Sites


def certificate(key, signer=None, issuer="mallory") -> str:
    """Return a certificate of a key in PEM. signer: whose signature it has; None: its own."""
    now = datetime.datetime.now(datetime.UTC)
    subject, by = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("mallory", issuer))
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(by)
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    signer = signer or key
    is_ed25519 = isinstance(signer, Ed25519PrivateKey)
    return builder.sign(signer, None if is_ed25519 else hashes.SHA256()).public_bytes(Encoding.PEM).decode()


def tampered(pem: str) -> str:
    """Return a certificate with another serial number than the one that was signed."""
    der = bytearray(x509.load_pem_x509_certificate(pem.encode()).public_bytes(Encoding.DER))
    der[20] ^= 1
    return x509.load_der_x509_certificate(bytes(der)).public_bytes(Encoding.PEM).decode()


KEY = Ed25519PrivateKey.generate()
OTHER = Ed25519PrivateKey.generate()
CURVE = ec.generate_private_key(ec.SECP256R1())
CARD = {"name": "mallory", "address": "127.0.0.1:9", "certificate": certificate(KEY)}
WRONG = [
    ({"certificate": certificate(KEY, OTHER)}, "is not signed by its own key"),
    ({"certificate": certificate(KEY, OTHER, issuer="other")}, "is not signed by its own key"),
    ({"certificate": tampered(CARD["certificate"])}, "is not signed by its own key"),
    ({"certificate": certificate(CURVE)}, "is not of an Ed25519 key"),
    ({"certificate": certificate(CURVE, KEY)}, "is not of an Ed25519 key"),
    ({"certificate": CARD["certificate"] + certificate(OTHER)}, "it holds 2 certificates instead of one"),
    ({"certificate": CARD["certificate"] + " " * 10_000}, "characters, of at most 8192"),
    (
        {"certificate": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"},
        "not a member's card",
    ),
    ({"certificate": "\ud800"}, "not a member's card"),
    ({"certificate": 5}, "its certificate is no text"),
    ({"name": 5}, "its name is no text"),
    ({"name": ["a"]}, "its name is no text"),
    ({"name": "a\x1b[2J"}, "is not a plain word"),
    ({"name": "north\u202e"}, "is not a plain word"),
    ({"name": "../../north"}, "is not a plain word"),
    ({"name": "x" * 65}, "is not a plain word"),
    ({"address": None}, "its address is no text"),
    ({"address": "host\x1b[2J:1"}, "is not HOST:PORT"),
    ({"address": "host: 1"}, "is not HOST:PORT"),
    ({"address": "host:²"}, "is not HOST:PORT"),
    ({"address": "host:" + "1" * 5000}, "is not HOST:PORT"),
    ({"address": "h" * 300 + ":1"}, "is not HOST:PORT"),
]
IDS = [f"{next(iter(change))} {number}" for number, (change, _) in enumerate(WRONG)]


def roster_text(**changes) -> str:
    """Return a roster that its signer has signed, whatever is in it."""
    body = {"format": 1, "epoch": 1, "members": [CARD]} | changes
    signature = KEY.sign(identity._signed(body)).hex()
    return json.dumps({**body, "signer": KEY.public_key().public_bytes_raw().hex(), "signature": signature})


def refused(read, path, *arguments) -> str:
    """Return the message with which a file is refused."""
    with pytest.raises(FedSpeedError) as error:
        read(path, *arguments)
    text = str(error.value)
    assert str(path) in text and text.isprintable() and len(text) < 1000
    return text


def test_a_card_as_it_is_made_is_read(tmp_path):
    path = tmp_path / "card.json"
    path.write_text(json.dumps(CARD))
    assert identity.read_card(path).key == KEY.public_key().public_bytes_raw()
    path.write_text(json.dumps(CARD | {"certificate": "a remark\r\n" + CARD["certificate"]}))
    assert identity.read_card(path).certificate == CARD["certificate"], "TLS trusts no other PEM in that text"


@pytest.mark.parametrize(("change", "reason"), WRONG, ids=IDS)
def test_a_card_is_verified_when_it_is_read(tmp_path, change, reason):
    path = tmp_path / "card.json"
    path.write_text(json.dumps(CARD | change))
    assert reason in refused(identity.read_card, path)
    path.write_text(roster_text(members=[CARD | change]))
    assert reason in refused(identity.read_roster, path, KEY.public_key().public_bytes_raw().hex())


@pytest.mark.parametrize(
    "text", ["", "5", "null", '"x"', "[]", "{}", "[" * 100_000, '{"name":' * 100_000, "\xff", "NaN", "{"]
)
def test_a_file_that_is_no_object_is_refused_by_its_name(tmp_path, text):
    path = tmp_path / "file.json"
    path.write_text(text, encoding="latin-1")
    refused(identity.read_card, path)
    refused(identity.read_roster, path, "00" * 32)
    assert main(["keys", "show", str(path)]) == 2


def test_a_file_of_any_size_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "MAX_FILE", 1000)
    path = tmp_path / "card.json"
    path.write_text(json.dumps(CARD) + " " * 1000)
    assert "1001 bytes, of at most 1000" in refused(identity.read_card, path)


WRONG_ROSTERS = [
    ({"epoch": "1"}, "wrong types"),
    ({"epoch": True}, "wrong types"),
    ({"epoch": 1.0}, "wrong types"),
    ({"format": True}, "wrong types"),
    ({"members": {"a": 1}}, "wrong types"),
    ({"members": None}, "wrong types"),
    ({"server": 5}, "wrong types"),
    ({"members": []}, "it has 0 members"),
    ({"members": [5] * 1001}, "it has 1001 members"),
    ({"members": [5]}, "not a member's card"),
    ({"members": [None]}, "not a member's card"),
    ({"members": [[CARD]]}, "not a member's card"),
    ({"server": "nobody"}, "not a roster"),
    ({"members": [CARD, CARD | {"name": "other", "address": "127.0.0.1:10"}]}, "the same key"),
    (
        {"members": [CARD, CARD | {"name": "MALLORY", "certificate": certificate(OTHER)}]},
        "the same name, mallory",
    ),
]


@pytest.mark.parametrize(("changes", "reason"), WRONG_ROSTERS, ids=range(len(WRONG_ROSTERS)))
def test_what_a_signer_signs_is_checked_too(tmp_path, changes, reason):
    path = tmp_path / "roster.json"
    path.write_text(roster_text(**changes))
    assert reason in refused(identity.read_roster, path, KEY.public_key().public_bytes_raw().hex())


def test_a_signer_that_is_no_key_is_not_printed_as_it_is(tmp_path):
    path = tmp_path / "roster.json"
    for signer in ("\x1b[2J" + "x" * 9000, 5, None, ["a"]):
        path.write_text(json.dumps(json.loads(roster_text()) | {"signer": signer}))
        assert "pin the key" in refused(identity.read_roster, path, "00" * 32)


def test_a_private_key_of_an_unknown_kind_is_refused(tmp_path):
    path = tmp_path / "a.key"
    path.touch(0o600)
    path.write_text("-----BEGIN PRIVATE KEY-----\nMBICAQAwBwYDKgMEBQAEBAQCAAA=\n-----END PRIVATE KEY-----\n")
    refused(identity.read_key, path)


@pytest.mark.parametrize("name", ["a\x1b[2J", "a\u202e", "a/b", "a\\b", "x" * 65, "", " "])
def test_no_identity_is_made_under_such_a_name(tmp_path, name):
    with pytest.raises(FedSpeedError, match="becomes the name of two files"):
        identity.make(name, "127.0.0.1:1", tmp_path)
    assert not list(tmp_path.iterdir())


def test_members_that_differ_in_case_alone_are_not_signed(tmp_path):
    sites = Sites(tmp_path, 2)
    path = identity.make("SITE0", "127.0.0.1:1", tmp_path / "other")[1]
    with pytest.raises(FedSpeedError, match="same name, site0"):
        identity.sign_roster([*sites.roster.members, identity.read_card(path)], sites.signer, 1)
