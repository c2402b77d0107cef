"""The identities of organisations, and the signed roster that lists them.

An identity is an Ed25519 key with a self-signed certificate. Machines know an organisation by this key. A
roster lists the members of a federation and is signed by whoever runs it; every site pins the signer's public
key.
"""

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from fedspeed.errors import FedSpeedError
from fedspeed.files import foreign_json, write_atomically
from fedspeed.routing.anonymous.crypto import AuthenticationError, check_signature, digest, public_bytes
from fedspeed.routing.config import RoutingConfig
from fedspeed.text_safety import MAX_ADDRESS, check_name, quoted, same_name

FORMAT = 1
MAX_MEMBERS = 1000
MAX_CERTIFICATE = 8192  # characters; one that `make` has written has about 500
MAX_FILE = 1 << 24  # bytes of a roster, or of a card
_YEARS = 10


@dataclass(frozen=True)
class MemberCard:
    """A member's public data.

    Attributes:
        address: HOST:PORT on which it listens. certificate: PEM.
    """

    name: str
    address: str
    certificate: str

    @cached_property
    def der(self) -> bytes:
        """The certificate in DER."""
        return x509.load_pem_x509_certificate(self.certificate.encode()).public_bytes(Encoding.DER)

    @cached_property
    def key(self) -> bytes:
        """The identity: the public key, 32 bytes."""
        return (
            x509
            .load_pem_x509_certificate(self.certificate.encode())
            .public_key()
            .public_bytes(Encoding.Raw, PublicFormat.Raw)
        )

    @property
    def host_and_port(self) -> tuple[str, int]:
        """The address in two parts."""
        return address_of(self.address, self.name)


@dataclass(frozen=True)
class Roster:
    """The members of a federation, numbered by their order.

    Attributes:
        epoch: grows with every new roster of the same federation.
        digest: of all that the signer has signed.
        server: number of the member that is the server, for methods that have one.
    """

    members: tuple[MemberCard, ...]
    epoch: int
    digest: bytes
    server: int | None = None

    @property
    def keys(self) -> tuple[bytes, ...]:
        """The identity keys of all members."""
        return tuple(card.key for card in self.members)

    def card_of(self, key: bytes) -> MemberCard:
        """Return the card of the member with this key."""
        return self.members[self.keys.index(key)]


def make(name: str, address: str, folder: Path) -> tuple[Path, Path]:
    """Make a new identity; return the paths of NAME.key (private key and certificate, readable for their
    owner only) and NAME.json (the card).

    Raises:
        FedSpeedError: there is one already, or the name or address is invalid.
    """
    address_of(address, "--address")
    try:
        check_name(name)
    except ValueError as error:
        raise FedSpeedError(f"{error}; it becomes the name of two files") from error
    secret = folder / f"{name}.key"
    public = folder / f"{name}.json"
    for path in (secret, public):
        if path.exists():
            raise FedSpeedError(
                f"{path}: is there already; an identity is made once. Choose another name, or remove it if "
                "it is not in use"
            )
    private = Ed25519PrivateKey.generate()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509
        .CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=365 * _YEARS))
        .sign(private, None)
    ).public_bytes(Encoding.PEM)
    folder.mkdir(parents=True, exist_ok=True)
    with open(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + certificate)
    write_atomically(
        public,
        (
            json.dumps({"name": name, "address": address, "certificate": certificate.decode()}, indent=1)
            + "\n"
        ).encode(),
    )
    return secret, public


def read_key(path: Path) -> Ed25519PrivateKey:
    """Read a private key.

    Raises:
        FedSpeedError: no such file, others may read it, or it holds no Ed25519 key.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise FedSpeedError(f"{path}: others may read this private key; chmod 600 {path}")
        key = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FedSpeedError(
            f"{path}: cannot be read as a private key ({error}); make one with `fedspeed keys new`"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise FedSpeedError(f"{path}: not an Ed25519 key; make one with `fedspeed keys new`")
    return key


def read_card(path: Path) -> MemberCard:
    """Read a member's card. Raises FedSpeedError if it is none."""
    return _card(_json(path), str(path))


def sign_roster(cards: Sequence[MemberCard], signer: Ed25519PrivateKey, epoch: int, server: str = "") -> str:
    """Return the text of a roster's file, signed.

    Args:
        server: name of the member that is the server; empty: none is.

    Raises:
        FedSpeedError: two members have the same name, key or address, or the server is no member.
    """
    try:
        _check_distinct(cards)
    except ValueError as error:
        raise FedSpeedError(f"{error}; every member needs its own") from error
    body: dict[str, Any] = {
        "format": FORMAT,
        "epoch": epoch,
        "members": [{"name": c.name, "address": c.address, "certificate": c.certificate} for c in cards],
    }
    if server:
        if server not in [c.name for c in cards]:
            raise FedSpeedError(
                f"the server {server} is no member; members are {', '.join(c.name for c in cards)}"
            )
        body["server"] = server
    return (
        json.dumps(
            {
                **body,
                "signer": fingerprint(public_bytes(signer)),
                "signature": signer.sign(_signed(body)).hex(),
            },
            indent=1,
        )
        + "\n"
    )


def read_roster(path: Path, signer: str) -> Roster:
    """Read a roster and verify its signature.

    Args:
        signer: the pinned key of who signs rosters, as `fedspeed keys show` prints it, or the file of its
            card.

    Raises:
        FedSpeedError: damaged, not signed by the pinned key, or not a roster; names the file.
    """
    text = _json(path)
    signer = pinned(signer)
    try:
        body = {key: text[key] for key in ("format", "epoch", "members")} | {
            key: text[key] for key in ("server",) if key in text
        }
        signed_by = text["signer"]
        signature = bytes.fromhex(text["signature"])
        _check_types(body)
    except (KeyError, ValueError, TypeError) as error:
        raise FedSpeedError(
            f"{path}: not a roster ({error}); make one with `fedspeed keys roster`"
        ) from error
    if signed_by != signer:
        raise FedSpeedError(
            f"{path}: signed by {quoted(signed_by)}, but routing.roster_signer={signer or '(empty)'}; pin "
            "the key of who runs the federation, which you got by other means than this file"
        )
    try:
        check_signature(bytes.fromhex(signer), signature, _signed(body))
    except (AuthenticationError, ValueError) as error:
        raise FedSpeedError(
            f"{path}: its signature is not valid; it was changed after it was signed, ask for it again"
        ) from error
    # Parsed only after the signature was verified.
    members = tuple(_card(member, str(path)) for member in body["members"])
    try:
        _check_distinct(members)
        server = [card.name for card in members].index(body["server"]) if "server" in body else None
    except ValueError as error:
        raise FedSpeedError(f"{path}: not a roster ({error}); ask its signer for another one") from error
    return Roster(members, body["epoch"], digest(_signed(body)), server)


def read_roster_to_show(path: Path) -> tuple[Roster, str] | None:
    """Return a roster and the public key of whoever has signed it, in hex; None if the file is no roster.

    The key is the one that the file names, so the caller must show it: it is not compared with a pinned one.

    Raises:
        FedSpeedError: the file is damaged, or not signed by the key that it names.
    """
    values = _json(path)
    if "members" not in values:
        return None
    signer = str(values.get("signer"))
    if signer.endswith(".json"):  # `pinned` would take it for a card's file
        raise FedSpeedError(f"{path}: not a roster; its signer is no public key")
    return read_roster(path, signer), signer


def membership(config: RoutingConfig) -> tuple[Ed25519PrivateKey, Roster]:
    """Return a site's private key, and the roster that lists it.

    Raises:
        FedSpeedError: one of the files is not configured or invalid, or the key is not in the roster.
    """
    for key in ("identity", "roster", "roster_signer"):
        if not getattr(config, key):
            raise FedSpeedError(
                f"routing.{key} is empty; routing.transport={config.transport} needs it "
                "(docs/organisations.md)"
            )
    roster = read_roster(Path(config.roster), config.roster_signer)
    private = read_key(Path(config.identity))
    if (public := public_bytes(private)) not in roster.keys:
        raise FedSpeedError(
            f"{config.identity}: its key {fingerprint(public)} is in no card of the roster (epoch "
            f"{roster.epoch}); ask for a roster with this site in it"
        )
    return private, roster


def pinned(signer: str) -> str:
    """Return the public key of who signs rosters, in hex, from itself or from the file of its card."""
    return fingerprint(read_card(Path(signer)).key) if signer.endswith(".json") else signer


def fingerprint(public: bytes) -> str:
    """Return a public key as people compare it: all of it, in hex."""
    return public.hex()


def _signed(body: Mapping[str, object]) -> bytes:
    """Return the bytes of a roster that are signed: canonical JSON under a prefix of their own."""
    return b"fedspeed roster" + json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises FedSpeedError if the file holds none."""
    try:
        with path.open("rb") as file:
            values = foreign_json(file.read(MAX_FILE + 1), MAX_FILE)
    except (OSError, ValueError) as error:
        raise FedSpeedError(
            f"{path}: cannot be read ({error}); give the file that `fedspeed keys` has written"
        ) from error
    if not isinstance(values, dict):
        raise FedSpeedError(f"{path}: holds no JSON object; give the file that `fedspeed keys` has written")
    return values


def _check_types(body: Mapping[str, Any]) -> None:
    """Raise ValueError unless the fields of a roster have the right types."""
    members = body["members"]
    if (
        type(body["format"]) is not int
        or body["format"] != FORMAT
        or type(body["epoch"]) is not int
        or not isinstance(body.get("server", ""), str)
        or not isinstance(members, list)
    ):
        raise ValueError("its fields have the wrong types")
    if not 0 < len(members) <= MAX_MEMBERS:
        raise ValueError(f"it has {len(members)} members, of at least 1 and at most {MAX_MEMBERS}")


def _check_distinct(cards: Sequence[MemberCard]) -> None:
    """Raise ValueError if two members have the same name, apart from case, the same key or address."""
    for field, values in (
        ("name", [same_name(card.name) for card in cards]),
        ("key", [card.key.hex() for card in cards]),
        ("address", [card.address for card in cards]),
    ):
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise ValueError(f"two members have the same {field}, {twice[0]}")


def _card(values: Any, where: str) -> MemberCard:
    """Check the values of a card. Raises FedSpeedError, which names `where` they were read."""
    try:
        fields = {key: values[key] for key in ("name", "address", "certificate")}
        for key, value in fields.items():
            if not isinstance(value, str):
                raise ValueError(f"its {key} is no text")
        check_name(fields["name"])
        address_of(fields["address"], where)
        pem = _certificate(fields["certificate"]).public_bytes(Encoding.PEM).decode()
        return MemberCard(fields["name"], fields["address"], pem)
    except (KeyError, TypeError, ValueError) as error:
        raise FedSpeedError(
            f"{where}: not a member's card ({error}); make one with `fedspeed keys new`"
        ) from error


def _certificate(text: str) -> x509.Certificate:
    """Return the certificate of a card. Its signature shows that whoever made it has the private key.

    Raises:
        ValueError: it is not exactly one certificate, of an Ed25519 key that has signed it itself.
    """
    if len(text) > MAX_CERTIFICATE:
        raise ValueError(f"its certificate has {len(text)} characters, of at most {MAX_CERTIFICATE}")
    try:
        found = x509.load_pem_x509_certificates(text.encode())
        keys = [certificate.public_key() for certificate in found]
    except (UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise ValueError(f"its certificate cannot be read: {quoted(error)}") from error
    if len(found) != 1:
        raise ValueError(f"it holds {len(found)} certificates instead of one")
    if not isinstance(keys[0], Ed25519PublicKey):
        raise ValueError("its certificate is not of an Ed25519 key")
    try:
        found[0].verify_directly_issued_by(found[0])
    except (InvalidSignature, TypeError, ValueError) as error:
        raise ValueError("its certificate is not signed by its own key") from error
    return found[0]


def address_of(text: str, where: str) -> tuple[str, int]:
    """Return host and port of an address. Raises FedSpeedError, which names `where` it was read, if it is not
    HOST:PORT.
    """
    host, _, port = text.rpartition(":")
    is_host = host and host.isprintable() and " " not in host and len(text) <= MAX_ADDRESS
    is_port = port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 65536
    if not is_host or not is_port:
        raise FedSpeedError(
            f"{where}: {text[:MAX_ADDRESS]!r} is not HOST:PORT, where this site listens for the others"
        )
    return host.strip("[]"), int(port)
