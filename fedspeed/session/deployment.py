"""The two ways to deploy a run: one job of one operator, or one job per organisation.

Everything that differs between them is here. `deployment_of` chooses by what the transport declares.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedspeed.config.run import RunConfig
from fedspeed.data.row_counts import RowCounts, counts_text
from fedspeed.errors import FedSpeedError, LostPeerError
from fedspeed.routing.exchange import Exchange
from fedspeed.routing.opening import TransportContext, open_transport
from fedspeed.routing.transport import Transport, TransportError

if TYPE_CHECKING:  # it loads cryptography, which a plain run does without
    from fedspeed.session.site import Site
    from fedspeed.session.site_agreement import SiteAgreement


@dataclass(frozen=True)
class Identity:
    """The identity of a participant in a masked exchange.

    Attributes:
        key: private key of this participant (Ed25519).
        members: public keys of all participants in their order, 32 bytes each.
        settings: digest of the settings that must be equal for all participants, and of this start: no
            earlier one had the same.
        names: of all participants, for messages; empty in a job, where their numbers are enough.
    """

    key: Any
    members: Sequence[bytes]
    settings: bytes
    names: Sequence[str] = ()


class Deployment(ABC):
    """What a session does differently by who has started its job.

    Args:
        config: of this job, with routing.mode resolved.
    """

    def __init__(self, config: RunConfig):
        self._config = config

    @property
    def membership(self) -> Any:
        """The membership of this organisation (`routing.listen_address.Membership`); None for one operator's
        job.
        """
        return None

    @abstractmethod
    def open_transport(self, name: str, context: TransportContext) -> Transport:
        """Connect to the other participants.

        Raises:
            LostPeerError: a participant did not connect.
            FedSpeedError: the transport lacks something it needs, or a participant has other settings.
        """

    @abstractmethod
    def identity(self, transport: Transport, fingerprint: str) -> Identity:
        """Return this participant's identity. Collective over the participants.

        Args:
            fingerprint: of the run (`RunRequest.fingerprint`), the same on all ranks of this job.
        """

    @abstractmethod
    def give_up(self, transport: Transport | None) -> None:
        """Leave the transport after a failure, while other participants may still wait for this one."""

    def renewal(self, is_participant: bool) -> Callable[[], bool]:
        """Return a function that tells whether this rank agrees to restart with a newer roster.

        Args:
            is_participant: whether this rank takes part in the exchange.
        """
        return lambda: False

    def check_epoch(self, folder: Path) -> None:
        """Compare this start's roster with the newest one that the run in the folder has used.

        Raises:
            FedSpeedError: this start's roster is older.
        """

    def keep_epoch(self, folder: Path) -> None:
        """Note in the folder of a run which roster it continues with."""

    def settled_marks(self, folder: Path) -> Any:
        """Return where the settled marks of a run are stored
        (`routing.anonymous.settlement.SettledMarks`); None: in memory, as long as the job runs.

        Raises:
            JournalError: they cannot be read.
        """
        return None

    def seal_rows(self, digest: str) -> str:
        """Return the digest of a job's rows in the form that its journal may store."""
        return digest

    def own_rows_notes(self, counts: RowCounts) -> list[str]:
        """Return remarks about the rows of this job alone, given their counts."""
        return []

    def make_agreement(self, exchange: Exchange, *, is_fresh: bool) -> "SiteAgreement | None":
        """Return this site's agreements with the others about the state of a run; None in a job of one
        operator, which has one journal.

        Args:
            exchange: of this participant. is_fresh: whether the user wants to start anew.
        """
        return None


class JobDeployment(Deployment):
    """One job of one operator: the launcher starts all participants, and one of them keeps the journal."""

    def open_transport(self, name: str, context: TransportContext) -> Transport:
        try:
            return open_transport(name, context)
        except TransportError as error:
            raise LostPeerError(f"the gateways could not connect with each other: {error}") from error

    def identity(self, transport: Transport, fingerprint: str) -> Identity:
        """Make a key for this start, and exchange public keys with the other participants."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        from fedspeed.routing.anonymous.crypto import digest
        from fedspeed.routing.anonymous.exchange import exchange_public_keys

        key = Ed25519PrivateKey.generate()
        members = exchange_public_keys(transport, self._config.cluster.start_timeout_s, key)
        # The keys are new, so that no signature of an earlier start is valid.
        return Identity(key, members, digest(fingerprint.encode(), *members))

    def give_up(self, transport: Transport | None) -> None:
        """Do nothing: closing would wait for the other participants, which end when this rank ends."""


class SiteDeployment(Deployment):
    """A job of one organisation among others.

    Its identity is in a signed roster, its settings are compared with those of the other sites, and it keeps
    a journal of its own, of states that all sites have signed.
    """

    _session = b""  # digest of the session, once the transport is open

    @cached_property
    def site(self) -> "Site":
        """The site of this organisation; its files and its base are read once."""
        from fedspeed.session.site import Site

        return Site(self._config)

    @property
    def membership(self) -> Any:
        return self.site.membership

    def open_transport(self, name: str, context: TransportContext) -> Transport:
        try:
            transport = open_transport(name, context)
        except TransportError as error:
            raise LostPeerError(f"the sites could not connect with each other: {error}") from error
        try:
            self._session = self.site.open_session(transport, context.timeout_s)
        except FedSpeedError:
            self.give_up(transport)
            raise
        except TransportError as error:
            self.give_up(transport)
            raise LostPeerError(
                f"a site was lost while all compared their settings: {error}",
                remedy="the same command tries again",
            ) from error
        return transport

    def identity(self, transport: Transport, fingerprint: str) -> Identity:
        member = self.membership
        names = [card.name for card in member.roster.members]
        return Identity(member.key, member.roster.keys, self._session, names)

    def give_up(self, transport: Transport | None) -> None:
        """End the run for all sites, and close the transport. Pending messages are sent first, so that all
        sites end for the same reason.

        Otherwise the others would take this site for lost and go on without it. Members that lie could then
        make honest sites give up one by one (by a signature that only one of them finds invalid, or by a sum
        that is below the weight of only one of them), and sum the update of the last one alone.
        """
        if transport is not None:
            transport.end_run()
            transport.close()

    def renewal(self, is_participant: bool) -> Callable[[], bool]:
        """Let the site's participant decide, which has read the current roster.

        Other ranks might read the file later and take a newer roster for the current one.
        """
        return self.site.renewed if is_participant else lambda: True

    def check_epoch(self, folder: Path) -> None:
        self.site.check_epoch(folder)

    def keep_epoch(self, folder: Path) -> None:
        self.site.keep_epoch(folder)

    def settled_marks(self, folder: Path) -> Any:
        from fedspeed.session.settled_marks import FileMarks

        return FileMarks(folder)

    def seal_rows(self, digest: str) -> str:
        """Return a digest keyed with a secret that is derived from the site's private key.

        Without the key, nobody who has the journal can test which rows it belongs to.

        Raises:
            FedSpeedError: the key of routing.identity cannot be read.
        """
        from fedspeed.session.site import sealed

        return sealed(digest, Path(self._config.routing.identity))

    def own_rows_notes(self, counts: RowCounts) -> list[str]:
        return [f"of these rows, this site's own are {counts_text(counts)}"] if counts.harmed else []

    def make_agreement(self, exchange: Exchange, *, is_fresh: bool) -> "SiteAgreement | None":
        from fedspeed.session.site_agreement import SiteAgreement

        return SiteAgreement(
            exchange, self.membership, session=self._session, settings=self.site.digest, is_fresh=is_fresh
        )


def deployment_of(config: RunConfig) -> Deployment:
    """Return the deployment of a configuration: by whether its transport connects organisations."""
    return SiteDeployment(config) if config.routing.between_organisations else JobDeployment(config)
