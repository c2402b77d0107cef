"""The address on which a site listens for the others, and the message for when it cannot."""

import errno
import os
import socket
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedspeed.errors import ConfigError
from fedspeed.routing.anonymous.crypto import public_bytes
from fedspeed.routing.config import RoutingConfig
from fedspeed.routing.identity import MemberCard, Roster, address_of, membership


@dataclass(frozen=True)
class ListenAddress:
    """A host and port to listen on.

    Attributes:
        source: what they come from, for messages: a site's configuration, or its card in the roster.
    """

    host: str
    port: int
    source: str

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Membership:
    """Describe which member of a roster a site is, and on which address it listens for the others.

    Attributes:
        key_file: the file of the private key and certificate. key: the private key.
    """

    key_file: str
    key: Ed25519PrivateKey
    roster: Roster
    listen: ListenAddress

    @property
    def public(self) -> bytes:
        """The public identity key of the site, 32 bytes."""
        return public_bytes(self.key)


def own_membership(routing: RoutingConfig) -> Membership:
    """Return this site's membership.

    Raises:
        FedSpeedError: a file is invalid, or the key is not in the roster.
    """
    key, roster = membership(routing)
    listen = listen_address(routing, roster.card_of(public_bytes(key)))
    return Membership(routing.identity, key, roster, listen)


def listen_address(routing: RoutingConfig, card: MemberCard) -> ListenAddress:
    """Return the address on which the site of this card listens: `routing.listen`, else that of the card.

    Raises:
        FedSpeedError: it is not HOST:PORT.
    """
    if routing.listen:
        host, port = address_of(routing.listen, "routing.listen")
        return ListenAddress(host, port, f"routing.listen={routing.listen}")
    return ListenAddress(*card.host_and_port, f"{card.name}'s card in {routing.roster}")


def open_port(address: ListenAddress) -> socket.socket:
    """Return a listening socket.

    Raises:
        ConfigError: another program uses the port, or this machine does not have the address.
    """
    try:
        return socket.create_server((address.host, address.port), backlog=64)
    except OSError as error:
        reason = error.strerror or str(error)
        # Name services have numbers of their own, which os.strerror does not know.
        if error.errno is not None and error.errno in errno.errorcode:
            reason = os.strerror(error.errno)
        raise ConfigError(
            f"cannot listen on {address}, which {address.source} says: {reason}; {_remedy(error, address)}"
        ) from error


def check_port(routing: RoutingConfig) -> None:
    """Check that this site can listen; leave nothing open.

    Raises:
        ConfigError: as of `open_port`.
        FedSpeedError: as of `own_membership`.
    """
    open_port(own_membership(routing).listen).close()


def _remedy(error: OSError, address: ListenAddress) -> str:
    """Return what to do about an address that cannot be listened on."""
    forwarded = "set routing.listen=HOST:PORT to another one here, to which the roster's is forwarded"
    if error.errno == errno.EADDRINUSE:
        return (
            f"end the program that listens there (`ss -ltnp sport = :{address.port}` names it; it may "
            f"be an earlier start of this site), {forwarded}, "
            "or make a card with another port"
        )
    if error.errno == errno.EACCES:
        return f"ports below 1024 are for root: {forwarded}"
    return (
        f"it must be an address of this machine: correct it, or {forwarded} (0.0.0.0:{address.port} for "
        "all that it has)"
    )
