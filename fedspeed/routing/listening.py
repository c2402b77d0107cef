"""Where a site listens for the others, and what to say when it cannot."""

import errno
import os
import socket
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedspeed.errors import ConfigError
from fedspeed.routing.anonymous.crypto import public_bytes
from fedspeed.routing.config import RoutingConfig
from fedspeed.routing.identity import Card, Roster, address_of, membership


@dataclass(frozen=True)
class ListenAddress:
    """Host and port to listen on. `source` says who has given them: a site's configuration or its card in the
    roster.
    """

    host: str
    port: int
    source: str

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Membership:
    """Who a site is among the members of a roster, and where it listens for the others."""

    key_file: str
    key: Ed25519PrivateKey
    roster: Roster
    listen: ListenAddress

    @property
    def public(self) -> bytes:
        """The site's identity: 32 bytes."""
        return public_bytes(self.key)


def own_membership(routing: RoutingConfig) -> Membership:
    """Return this site's membership. Raises FedSpeedError: a file is wrong, or the files do not fit each
    other.
    """
    key, roster = membership(routing)
    listen = listen_address(routing, roster.card_of(public_bytes(key)))
    return Membership(routing.identity, key, roster, listen)


def listen_address(routing: RoutingConfig, card: Card) -> ListenAddress:
    """Where the site of this card listens: `routing.listen`, else its address in the roster. Raises
    FedSpeedError: neither is HOST:PORT.
    """
    if routing.listen:
        host, port = address_of(routing.listen, "routing.listen")
        return ListenAddress(host, port, f"routing.listen={routing.listen}")
    return ListenAddress(*card.place, f"{card.name}'s card in {routing.roster}")


def open_port(address: ListenAddress) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: another program has the port, or the address is none of this machine's.
    """
    try:
        return socket.create_server((address.host, address.port), backlog=64)
    except OSError as error:
        known = error.errno in errno.errorcode  # name services have numbers of their own
        why = os.strerror(error.errno) if known else error.strerror or error
        raise ConfigError(
            f"cannot listen on {address}, which {address.source} says: {why}; {_remedy(error, address)}"
        ) from error


def check_port(routing: RoutingConfig) -> None:
    """Raises ConfigError where `open_port` would for this site, FedSpeedError where its files are wrong;
    leaves nothing open.
    """
    open_port(own_membership(routing).listen).close()


def _remedy(error: OSError, address: ListenAddress) -> str:
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
