"""Who the ranks of a job answer to: one operator who has started all of them, or one organisation among
others.

All that differs between the two stands here. It is chosen once, by `deployment_of`, from what the transport
declares.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedspeed.checkpoint.journal import Journal
from fedspeed.config.run import RunConfig
from fedspeed.data.row_counts import RowCounts, counts_text
from fedspeed.errors import FedSpeedError, JournalError, LostPeerError
from fedspeed.federation.folded_layout import shared_layout
from fedspeed.federation.layout import Layout
from fedspeed.routing.opening import TransportContext, open_transport
from fedspeed.routing.transport import Transport, TransportError


@dataclass(frozen=True)
class Identity:
    """Who a participant is in a masked exchange.

    Attributes:
        key: its private key (Ed25519).
        members: public keys of all participants in their order, 32 bytes each.
        settings: digest of everything that must be equal for all of them.
    """

    key: Any
    members: Sequence[bytes]
    settings: bytes


class Deployment(ABC):
    """What a session asks about who has started it.

    Args:
        config: of this job; routing.mode is settled where it matters.
    """

    def __init__(self, config: RunConfig):
        self._config = config

    @property
    def membership(self) -> Any:
        """Who this organisation is among others (`routing.listening.Membership`); None inside one job."""
        return None

    @abstractmethod
    def open_transport(self, name: str, meeting: TransportContext) -> Transport:
        """Connect to the other participants, which are about to do the same run.

        Raises:
            LostPeerError: somebody did not come. FedSpeedError: what the transport needs is not there, or
                somebody means another run.
        """

    @abstractmethod
    def identity(self, transport: Transport, fingerprint: str) -> Identity:
        """Return who this participant is in a masked exchange. Collective over the participants.

        Args:
            fingerprint: what all ranks of this job have in common (`RunRequest.fingerprint`).
        """

    @abstractmethod
    def give_up(self, transport: Transport | None) -> None:
        """Leave the transport of a run that has failed, which other participants may still be waiting in."""

    def renewal(self, speaks: bool) -> Callable[[], bool]:
        """Return what tells whether this rank has nothing against starting again with a newer list of
        participants.

        Args:
            speaks: whether this rank speaks for its clients.
        """
        return lambda: False

    def check_epoch(self, folder: Path) -> None:
        """Hold this start's list of participants against the newest one that the run in the folder has known.

        Raises:
            FedSpeedError: it is older.
        """

    def keep_epoch(self, folder: Path) -> None:
        """Note in the folder of a run which list of participants it goes on with."""

    def seal_rows(self, digest: str) -> str:
        """Return the digest of a job's rows as its journal may keep it."""
        return digest

    def own_rows_notes(self, counts: RowCounts) -> list[str]:
        """Return what is to be said about the rows of this job alone, whose counts these are."""
        return []

    def check_alike(self, link, journal: Journal, number: int, differs: bool) -> None:
        """Agree that all who have the round that is offered have the same state of it. Collective over all
        ranks.

        Args:
            number: of the round. differs: whether this rank's journal holds another state of it.

        Raises:
            JournalError: somebody has another one; on all ranks alike.
        """

    def share_best(self, link, journal: Journal, best: int, layout) -> None:
        """Give the best round's tensors to those that do not have them. Collective over all ranks.

        Raises:
            JournalError: nobody has them; on all ranks alike.
        """


class JobDeployment(Deployment):
    """One job of one operator: its participants trust the launcher that has started them all, and one of them
    keeps the journal for all.
    """

    def open_transport(self, name: str, meeting: TransportContext) -> Transport:
        try:
            return open_transport(name, meeting)
        except TransportError as error:
            raise LostPeerError(f"the gateways could not connect with each other: {error}") from error

    def identity(self, transport: Transport, fingerprint: str) -> Identity:
        """Make a key for this start, and tell it to the others."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        from fedspeed.routing.anonymous.crypto import digest
        from fedspeed.routing.anonymous.exchange import exchange_public_keys

        key = Ed25519PrivateKey.generate()
        members = exchange_public_keys(transport, self._config.cluster.start_timeout_s, key)
        return Identity(key, members, digest(fingerprint.encode()))

    def give_up(self, transport: Transport | None) -> None:
        """Do nothing: closing would wait for the others, and the end of this rank is what ends them."""


class SiteDeployment(Deployment):
    """A job of one organisation among others: its identity is in a signed roster, its settings are compared
    with the others', and it keeps a journal of its own.
    """

    @cached_property
    def site(self):
        """This organisation (session.site.Site); reads its files and its base once."""
        from fedspeed.session.site import Site

        return Site(self._config)

    @property
    def membership(self) -> Any:
        return self.site.membership

    def open_transport(self, name: str, meeting: TransportContext) -> Transport:
        try:
            transport = open_transport(name, meeting)
        except TransportError as error:
            raise LostPeerError(f"the sites could not connect with each other: {error}") from error
        try:
            self.site.agree(transport, meeting.timeout_s)
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
        return Identity(member.key, member.roster.keys, self.site.digest)

    def give_up(self, transport: Transport | None) -> None:
        """Close it: sending is a thread's there, and what this site had to say goes out first, so that the
        others end for the same reason.
        """
        if transport is not None:
            transport.close()

    def renewal(self, speaks: bool) -> Callable[[], bool]:
        """Ask the rank that speaks for the site, which has read the present roster. The others would read the
        file at another time, and take for the present roster what is the newer one.
        """
        return self.site.renewed if speaks else lambda: True

    def check_epoch(self, folder: Path) -> None:
        self.site.check_epoch(folder)

    def keep_epoch(self, folder: Path) -> None:
        self.site.keep_epoch(folder)

    def seal_rows(self, digest: str) -> str:
        """Return a digest made with a secret that follows from the site's private key: whoever is given the
        journal cannot try out which rows it belongs to.

        Raises:
            FedSpeedError: the key of routing.identity cannot be read.
        """
        from fedspeed.session.site import sealed

        return sealed(digest, Path(self._config.routing.identity))

    def own_rows_notes(self, counts: RowCounts) -> list[str]:
        return [f"of these rows, this site's own are {counts_text(counts)}"] if counts.harmed else []

    def check_alike(self, link, journal: Journal, number: int, differs: bool) -> None:
        """Agree on the state: one site alone cannot put another one in its place."""
        if link.share(np.ones(1), float(differs)) is not None:
            whose = "this one differs" if differs else "another differs"
            raise JournalError(
                f"{journal.folder}: the sites hold different states of round {number}; {whose} from what "
                "was offered. Compare the journals; a site whose folder is moved aside takes the others' "
                "state"
            )

    def share_best(self, link, journal: Journal, best: int, layout) -> None:
        try:
            own = journal.load_best(best)
        except JournalError:
            own = None
        known = float(own is not None)
        layout = shared_layout(link, layout, Layout.of(own) if own else None, known)
        offered = layout.flatten(own) if own else np.zeros(layout.size, dtype=np.float32)
        shared = link.share(offered, known)
        if shared is None:
            raise JournalError(
                f"{journal.folder}: no site has the tensors of round {best}, the best one so far; start "
                "anew with --fresh on all"
            )
        if own is None:
            journal.save_best(best, layout.unflatten(shared))


def deployment_of(config: RunConfig) -> Deployment:
    """Return the deployment that a configuration means: by whether its transport is one between
    organisations.
    """
    return SiteDeployment(config) if config.routing.between_organisations else JobDeployment(config)
