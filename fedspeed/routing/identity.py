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
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from fedspeed.errors import FedSpeedError
from fedspeed.files import json_value, write_atomically
from fedspeed.routing.anonymous.crypto import AuthenticationError, check_signature, digest, public_bytes
from fedspeed.routing.config import RoutingConfig

FORMAT = 1
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
    if not name or "/" in name or name.startswith("."):
        raise FedSpeedError(f"name {name!r}: give a plain word; it becomes the name of two files")
    secret = folder / f"{name}.key"
    public = folder / f"{name}.json"
    for path in (secret, public):
        if path.exists():
            raise FedSpeedError(
                f"{path}: is there already; an identity is made once. Choose another name, or remove it if "
                "it is not in use"
            )
    private = Ed25519PrivateKey.generate()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
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
    except (OSError, ValueError, TypeError) as error:
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
    for field, values in (
        ("name", [card.name for card in cards]),
        ("key", [card.key.hex() for card in cards]),
        ("address", [card.address for card in cards]),
    ):
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise FedSpeedError(f"two members have the same {field}, {twice[0]}; every member needs its own")
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
        FedSpeedError: damaged, not signed by the pinned key, or not a roster.
    """
    text = _json(path)
    signer = pinned(signer)
    try:
        body = {key: text[key] for key in ("format", "epoch", "members")} | {
            key: text[key] for key in ("server",) if key in text
        }
        signed_by = text["signer"]
        signature = bytes.fromhex(text["signature"])
        if (
            body["format"] != FORMAT
            or not isinstance(body["epoch"], int)
            or not isinstance(body["members"], list)
        ):
            raise ValueError("its fields have the wrong types")
    except (KeyError, ValueError, TypeError) as error:
        raise FedSpeedError(
            f"{path}: not a roster ({error}); make one with `fedspeed keys roster`"
        ) from error
    if signed_by != signer:
        raise FedSpeedError(
            f"{path}: signed by {signed_by}, but routing.roster_signer={signer or '(empty)'}; pin the key of "
            "who runs the federation, which you got by other means than this file"
        )
    try:
        check_signature(bytes.fromhex(signer), signature, _signed(body))
    except (AuthenticationError, ValueError) as error:
        raise FedSpeedError(
            f"{path}: its signature is not valid; it was changed after it was signed, ask for it again"
        ) from error
    # Parsed only after the signature was verified.
    members = tuple(_card(member, str(path)) for member in body["members"])
    names = [card.name for card in members]
    server = names.index(body["server"]) if "server" in body else None
    return Roster(members, body["epoch"], digest(_signed(body)), server)


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
        values = json_value(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FedSpeedError(
            f"{path}: cannot be read ({error}); give the file that `fedspeed keys` has written"
        ) from error
    if not isinstance(values, dict):
        raise FedSpeedError(f"{path}: holds no JSON object; give the file that `fedspeed keys` has written")
    return values


def _card(values: Any, where: str) -> MemberCard:
    """Check the values of a card. Raises FedSpeedError, which names `where` they were read."""
    try:
        card = MemberCard(str(values["name"]), str(values["address"]), str(values["certificate"]))
        address_of(card.address, where)
        if len(card.key) != 32:
            raise ValueError("not an Ed25519 key")
        return card
    except (KeyError, TypeError, ValueError) as error:
        raise FedSpeedError(
            f"{where}: not a member's card ({error}); make one with `fedspeed keys new`"
        ) from error


def address_of(text: str, where: str) -> tuple[str, int]:
    """Return host and port of an address. Raises FedSpeedError, which names `where` it was read, if it is not
    HOST:PORT.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise FedSpeedError(f"{where}: {text!r} is not HOST:PORT, where this site listens for the others")
    return host.strip("[]"), int(port)
