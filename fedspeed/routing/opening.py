"""Open a transport by its name in `routing.config.TRANSPORTS`."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedspeed.errors import ConfigError
from fedspeed.routing.config import TRANSPORTS
from fedspeed.routing.transport import Transport

if TYPE_CHECKING:  # needs cryptography, which a plain run does without
    from fedspeed.routing.listen_address import Membership

SINGLE = next(name for name, facts in TRANSPORTS.items() if facts.in_process)
USUAL = next(name for name, facts in TRANSPORTS.items() if facts.usual)


@dataclass(frozen=True, kw_only=True)
class TransportContext:
    """Describe the participants of an exchange, and how they find each other.

    Attributes:
        asked: routing.transport as it is configured, for messages.
        me: this world rank.
        participants: world ranks that speak for their clients, in order, equal on all ranks.
        world_size: ranks that the launcher has started.
        timeout_s: how long connecting may take.
        connect: returns a torch store that all ranks of the job share, below the prefix that it is called
            with.
        interfaces: returns the names of the network interfaces of this machine that connect it with the other
            participants, separated by commas.
        member: which organisation this is among others; None inside one job.
    """

    asked: str
    me: int
    participants: tuple[int, ...]
    world_size: int
    timeout_s: float
    connect: Callable[[str], Any] | None = None
    interfaces: Callable[[], str] | None = None
    member: "Membership | None" = None


def resolve(asked: str, launcher: str, participants: int) -> str:
    """Return the name of the transport that a job takes. Pure.

    Args:
        asked: routing.transport, a name of `TRANSPORTS` or `auto`.
        launcher: the kind of launch (`cluster.discover.Kind`).
        participants: how many ranks of the job speak for clients.

    Raises:
        ConfigError: a transport of one process is asked for, but participants are several processes.
    """
    if asked == "auto":
        suggested = [name for name, facts in TRANSPORTS.items() if launcher in facts.auto_under]
        several = suggested[0] if suggested else USUAL
        return several if participants > 1 else SINGLE
    facts = TRANSPORTS[asked]
    if facts.between_organisations or facts.started_by_mpi:
        return asked
    if facts.in_process and participants > 1:
        raise ConfigError(
            f"routing.transport={asked} is for a single participant, but {participants} ranks speak for "
            f"clients; set routing.transport=auto, or {USUAL}"
        )
    return asked if participants > 1 else SINGLE


def open_transport(name: str, context: TransportContext) -> Transport:
    """Connect to the other participants. All of them call it, or all ranks of a job that MPI has started.

    Raises:
        TransportError: somebody did not connect in time.
        FedSpeedError: what the transport needs is not there.
    """
    return import_module(TRANSPORTS[name].module).open_transport(context)
