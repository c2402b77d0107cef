"""The configuration of how updates travel between clients, and the tables of modes and transports."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple


class ModeFacts(NamedTuple):
    """Describe a mode: whether updates are masked, and whether their chunks go through relays."""

    masked: bool
    mixed: bool

    @property
    def anonymous(self) -> bool:
        """Whether it hides anything, so that the anonymous exchange is needed."""
        return self.masked or self.mixed


MODES = {
    "plain": ModeFacts(masked=False, mixed=False),
    "mix": ModeFacts(masked=False, mixed=True),
    "mask": ModeFacts(masked=True, mixed=False),
    "mix+mask": ModeFacts(masked=True, mixed=True),
}


@dataclass(frozen=True, kw_only=True)
class TransportFacts:
    """Describe what the rest of FedSpeed needs to know of a transport.

    Attributes:
        module: the module whose `open_transport(context)` opens one (see `routing.opening.TransportContext`).
        between_organisations: whether every participant is a job of its own, which its organisation starts.
        in_process: whether all participants live in one process. A single participant, who has nobody to send
            to, uses it.
        usual: whether routing.transport=auto means it under launchers that no `auto_under` names.
        started_by_mpi: whether MPI must have started the ranks. All ranks of the job then open it together,
            before anything is read, those that do not speak for clients included; and it has
            `abort(exit_code)`, which ends all of them.
        outlives_losses: whether it goes on among the others when a participant is lost.
        outlives_under: kinds of launchers under which it does so too, if they were asked to leave the other
            ranks alone.
        auto_under: kinds of launchers (`cluster.discover.Kind`) under which routing.transport=auto means it.
    """

    module: str
    between_organisations: bool = False
    in_process: bool = False
    usual: bool = False
    started_by_mpi: bool = False
    outlives_losses: bool = False
    outlives_under: tuple[str, ...] = ()
    auto_under: tuple[str, ...] = ()


# A new transport is a module and a line here (docs/extending.md).
TRANSPORTS = {
    "mpi": TransportFacts(
        module="fedspeed.routing.transports.mpi",
        started_by_mpi=True,
        outlives_under=("openmpi",),
        auto_under=("openmpi",),
    ),
    "gloo": TransportFacts(module="fedspeed.routing.transports.gloo", usual=True),
    "local": TransportFacts(module="fedspeed.routing.transports.local", in_process=True),
    "tls": TransportFacts(
        module="fedspeed.routing.transports.tls", between_organisations=True, outlives_losses=True
    ),
}


DEFAULT_MESSAGE_MIB = 1024

if TYPE_CHECKING:  # type checkers read no literal that is computed
    ModeName = str
    TransportName = str
else:
    ModeName = Literal["auto", *MODES]
    TransportName = Literal["auto", *TRANSPORTS]


@dataclass(frozen=True)
class RoutingConfig:
    """Configure the exchange: the keys `routing.*` (docs/config.md)."""

    mode: ModeName = field(
        default="auto",
        metadata={
            "help": (
                "how updates are protected. plain: an ordinary sum, inside one trust domain; mask: "
                "masked, so that only the sum is learned; mix: through relays but not masked, so that "
                "owners of chunks see values without a name; mix+mask: both (see "
                "fedspeed/routing/THREATS.md). auto: mix+mask, but plain in one operator's job with "
                "fewer than routing.min_participants"
            )
        },
    )
    transport: TransportName = field(
        default="auto",
        metadata={
            "help": (
                "auto: mpi under mpirun, else gloo, local for a single participant. tls: one job per "
                "organisation, each started by its owner"
            )
        },
    )
    identity: str = field(
        default="",
        metadata={"help": "tls: private key of this site, made by `fedspeed keys new`", "path": ()},
    )
    roster: str = field(
        default="",
        metadata={"help": "tls: signed list of the members, made by `fedspeed keys roster`", "path": ()},
    )
    roster_signer: str = field(
        default="",
        metadata={
            "help": (
                "tls: pinned public key of the roster's signer: as `fedspeed keys show` prints it, or "
                "the file of the signer's card"
            ),
            "path": (),
        },
    )
    listen: str = field(
        default="", metadata={"help": "tls: HOST:PORT to listen on, if it is not the address in the roster"}
    )
    deadline_s: float = field(
        default=1800.0,
        metadata={
            "help": "longest wait for the other participants' updates of a round",
            "above": 0.0,
            "max": 10_000_000,
        },
    )
    step_deadline_s: float = field(
        default=120.0,
        metadata={
            "help": (
                "mask, mix: longest wait for another participant within an exchange, after all have begun it"
            ),
            "above": 0.0,
            "max": 10_000_000,
        },
    )
    relays: int = field(
        default=2,
        metadata={
            "help": "mix: relays on each path, as far as there are enough participants",
            "min": 1,
            "max": 7,
        },
    )
    cell_kib: int = field(
        default=4096,
        metadata={
            "help": "mask, mix: content of a cell, the fixed size of all messages",
            "min": 1,
            "max": 65536,
        },
    )
    cipher: Literal["aes-128-gcm", "chacha20-poly1305"] = field(
        default="aes-128-gcm",
        metadata={
            "help": (
                "mask, mix: cipher of seals and key streams; AES is faster on processors with AES "
                "instructions"
            )
        },
    )
    min_participants: int = field(
        default=3,
        metadata={
            "help": (
                "mask, mix: fewest participants of a sum; the fewer they are, the more the sum tells "
                "about each"
            ),
            "min": 2,
            "max": 256,
        },
    )
    message_mib: int = field(
        default=DEFAULT_MESSAGE_MIB,
        metadata={
            "help": (
                "methods with a server: largest message that is accepted from another participant, which "
                "may take several times as much memory"
            ),
            "min": 1,
            "max": 65536,
        },
    )
    max_weight: float = field(
        default=10_000_000.0,
        metadata={
            "help": (
                "mask, mix, tls: largest weight of one participant, in answer tokens of its clients' "
                "training rows; a public bound, equal on all sites, of what a participant that lies can claim"
            ),
            "above": 0.0,
            "max": 1_000_000_000_000,
        },
    )
    attempts: int = field(
        default=5,
        metadata={"help": "mask, mix: attempts at one exchange, each with new masks", "min": 1, "max": 100},
    )

    def resolved(self, participants: int) -> "RoutingConfig":
        """Return this configuration with mode `auto` replaced by what it means for so many participants.

        Between organisations it never means plain.
        """
        if self.mode != "auto":
            return self
        masked = self.between_organisations or participants >= self.min_participants
        return replace(self, mode="mix+mask" if masked else "plain")

    @property
    def anonymous(self) -> bool:
        """Whether nobody can link an update to a client (False for `auto`, which is resolved later)."""
        return self.mode in MODES and MODES[self.mode].anonymous

    @property
    def between_organisations(self) -> bool:
        """Whether every participant is a job of its own, started by its organisation."""
        return self.transport in TRANSPORTS and TRANSPORTS[self.transport].between_organisations

    @property
    def started_by_mpi(self) -> bool:
        """Whether the configured transport needs ranks that MPI has started."""
        return self.transport in TRANSPORTS and TRANSPORTS[self.transport].started_by_mpi

    @property
    def sums_only(self) -> bool:
        """Whether outputs must say nothing about single clients: in the anonymous modes, and between
        organisations. (False for `auto` inside one job.)
        """
        return self.anonymous or self.between_organisations
