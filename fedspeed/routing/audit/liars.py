"""Members of a coalition that lies: each deviates from the protocol in one thing, and follows it otherwise.

A liar acts on what its own member knows, and on who belongs to its coalition. What the coalition learns from
all its members together, `audit.knowledge` computes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedspeed.routing.anonymous.announcement import BODY, Announcement, commit_to_contribution
from fedspeed.routing.anonymous.announcement import commit_to_secret as commit
from fedspeed.routing.anonymous.crypto import DIGEST, KEY, digest, public_bytes
from fedspeed.routing.anonymous.lists import entry_size
from fedspeed.routing.anonymous.paths import backup_of
from fedspeed.routing.anonymous.phases import AgreedSum, AttemptFailed, Payload, Phase, Swap, as_message
from fedspeed.routing.anonymous.protocol import Member
from fedspeed.routing.anonymous.settlement import OTHER_VECTOR
from fedspeed.routing.anonymous.statements import statement

T = TypeVar("T")


class Colluder(Member):
    """A member of the coalition that sends what the protocol asks for, and is silent about the others' lies.

    Attributes:
        colluders: numbers of the members of the coalition in this attempt.
        kept: by member, the secrets of self masks that it knows and does not admit to know.
    """

    colluders: frozenset[int] = frozenset()
    kept: Mapping[int, bytes] = {}

    def run(self) -> Phase[AgreedSum]:
        """Play the attempt; leave without a word where an honest member would say that it ends the run."""
        try:
            return (yield from super().run())
        except AttemptFailed as failure:
            raise AttemptFailed(str(failure), failure.lost, failure.blamed) from failure

    @property
    def honest(self) -> list[int]:
        """The numbers of the other members."""
        return [i for i in range(self.n) if i not in self.colluders]

    @property
    def victim(self) -> int:
        """The honest member that is treated differently from the others."""
        return self.honest[0]

    def _check_sums(self, total: np.ndarray) -> None:
        """Find nothing wrong with what owners of the coalition have opened."""

    def _signed(self, label: str, content: bytes) -> bytes:
        """Return a signature of another content than the one that the protocol asks for."""
        return self._identity.sign(statement(label, self.context, content))


def altered(steps: Phase[T], change: Callable[[list[Payload]], None]) -> Phase[T]:
    """Play a phase of the protocol, after `change` has changed the first messages that it sends."""
    swap: Swap = next(steps)
    change(swap.parts)
    while True:
        arrived = yield swap
        try:
            swap = steps.send(arrived)
        except StopIteration as stop:
            return stop.value


class TwoFacedAnnouncer(Colluder, ABC):
    """Announces other values to some members than to the rest, each announcement with a valid signature."""

    def _announce(self) -> Phase[None]:
        return altered(super()._announce(), self._announce_otherwise)

    def _announce_otherwise(self, parts: list[Payload]) -> None:
        own = Announcement.unpack(as_message(parts[self.me])[:BODY])
        other = self._other(own)
        for i in self._deceived():
            parts[i] = other.pack() + self._signed("announce", other.content)

    def _deceived(self) -> list[int]:
        """Return the members that get the other announcement."""
        return [self.victim]

    @abstractmethod
    def _other(self, own: Announcement) -> Announcement:
        """Return the announcement for the deceived."""


class TwoOnionKeys(TwoFacedAnnouncer):
    """Announces another onion key to one member, whose cells do not open then, so that it looks guilty."""

    def _other(self, own: Announcement) -> Announcement:
        return replace(own, onion_key=public_bytes(X25519PrivateKey.generate()))


class TwoMaskKeys(TwoFacedAnnouncer):
    """Announces another mask key to one member, so that its masks do not cancel."""

    def _other(self, own: Announcement) -> Announcement:
        return replace(own, mask_key=public_bytes(X25519PrivateKey.generate()))


class TwoContributions(TwoFacedAnnouncer):
    """Commits to another contribution to the beacon for one member, and reveals it to that one."""

    _second = digest(b"another contribution")

    def _other(self, own: Announcement) -> Announcement:
        return replace(own, beacon_commitment=commit_to_contribution(self._second))

    def _reveal(self) -> Phase[None]:
        def change(parts: list[Payload]) -> None:
            parts[self.victim] = self._second + as_message(parts[self.victim])[KEY:]

        return altered(super()._reveal(), change)


class TwoMarks(TwoFacedAnnouncer):
    """Claims to have settled the update before, to all but one member, which then alone would add its own."""

    def _deceived(self) -> list[int]:
        return self.honest[1:]

    def _other(self, own: Announcement) -> Announcement:
        return replace(own, mark=OTHER_VECTOR)


class FalseMark(TwoMarks):
    """Claims to have settled the update before, to all members alike."""

    def _deceived(self) -> list[int]:
        return list(range(self.n))


class LateChooser(Colluder):
    """Reveals another contribution to the beacon than it has committed to."""

    def _reveal(self) -> Phase[None]:
        self._contribution = bytes(KEY)
        return super()._reveal()


class TwoFacedLister(Colluder):
    """As an owner, signs another list of summed cells for one member."""

    def _collect(self) -> Phase[None]:
        return altered(super()._collect(), self._list_otherwise)

    def _list_otherwise(self, parts: list[Payload]) -> None:
        size = len(self.plan.owned(self.me)) * entry_size(self.n)
        message = as_message(parts[self.victim])
        text = digest(message[:DIGEST])[:16] + message[16:size]  # the first serial is another one
        signature = self._signed("collect", digest(text))
        parts[self.victim] = text + signature + message[size + len(signature) :]


class PartialConfirmer(Colluder):
    """Confirms the lists to all but one member, which then lacks a certificate."""

    def _confirm(self) -> Phase[None]:
        def change(parts: list[Payload]) -> None:
            parts[self.victim] = as_message(parts[self.victim])[:DIGEST].ljust(len(parts[self.me]), b"\0")

        return altered(super()._confirm(), change)


class FalseOpener(Colluder):
    """As an owner, opens its chunks falsely to all members."""

    def _gather_sums(self) -> Phase[np.ndarray]:
        def change(parts: list[Payload]) -> None:
            for i in self._deceived():
                parts[i] = bytes(len(as_message(parts[i])))

        return altered(super()._gather_sums(), change)

    def _deceived(self) -> list[int]:
        return list(range(self.n))


class TwoFacedOpener(FalseOpener):
    """As an owner, opens its chunks falsely to one member."""

    def _deceived(self) -> list[int]:
        return [self.victim]


class FalseSecret(Colluder):
    """Reveals another secret of its self mask than the one that it has used, to all members."""

    def _unmask(self) -> Phase[None]:
        if not self.parameters.masked:
            return super()._unmask()
        return altered(super()._unmask(), self._reveal_otherwise)

    def _reveal_otherwise(self, parts: list[Payload]) -> None:
        false = digest(b"another secret")
        for i in self._deceived():
            parts[i] = false + self._signed("unmask", commit(false))

    def _deceived(self) -> list[int]:
        return list(range(self.n))


class TwoFacedSecret(FalseSecret):
    """Reveals another secret of its self mask to one member."""

    def _deceived(self) -> list[int]:
        return [self.victim]


class WithheldSecret(FalseSecret):
    """Takes the secrets of all self masks, and reveals its own to nobody."""

    def _reveal_otherwise(self, parts: list[Payload]) -> None:
        for i in self._deceived():
            parts[i] = b""

    def _deceived(self) -> list[int]:
        return [i for i in range(self.n) if i != self.me]  # the coalition too: all miss it then


class PartlyWithheldSecret(WithheldSecret):
    """Takes the secrets of all self masks, and reveals its own to all but one member."""

    def _deceived(self) -> list[int]:
        return [self.victim]


class KeptSecrets(Colluder):
    """Keeps the secret of a lost member's self mask, and acts as if it lacked it too."""

    def _share_secrets(self) -> Phase[None]:
        self.kept = {i: self._self_secrets.pop(i) for i in self._lost & self._self_secrets.keys()}
        return super()._share_secrets()


class Leaver(Colluder):
    """Leaves once the set is committed, before its secret does."""

    def _open(self) -> Phase[AgreedSum]:
        raise AttemptFailed("it has left")
        yield  # never reached: it makes this a generator, as a phase is


class BeaconGrinder(Colluder):
    """Spoils an attempt by a false complaint, unless the paths that the beacon has drawn give the first chunk
    to relays of the coalition.

    It complains about sums that it stores as a backup: nobody else has seen them, so that it is not named
    alone, and stays.
    """

    @property
    def has_first_path(self) -> bool:
        """Whether all relays of the first chunk collude."""
        return self.colluders.issuperset(self.plan.paths[0][:-1])

    def _confirm(self) -> Phase[None]:
        if not self.has_first_path:
            self.complaints |= {
                chunk
                for chunk in range(self.plan.chunks)
                if backup_of(self.plan.owner(chunk), self.n) == self.me
            }
        return super()._confirm()
