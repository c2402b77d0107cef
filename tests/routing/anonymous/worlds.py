"""Runs of several sums with liars among the sites, and what must hold in all of them."""

import threading
import traceback
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedspeed.errors import FedSpeedError
from fedspeed.routing.anonymous import attempts
from fedspeed.routing.anonymous.attempts import Attempts, Summand
from fedspeed.routing.anonymous.crypto import public_bytes
from fedspeed.routing.anonymous.protocol import Member
from fedspeed.routing.anonymous.settlement import MemoryMarks
from fedspeed.routing.config import RoutingConfig
from tests.routing.anonymous.liars import Liar
from tests.routing.anonymous.virtual_network import VirtualTransport

# Also for beginning a sum: a member that waits longer for that than the others wait in a phase may be taken
# for lost (`fedspeed.routing.anonymous.deadlines`).
STEP_DEADLINE_S = 100.0
CONFIG = RoutingConfig(
    "mix+mask", cell_kib=1, step_deadline_s=STEP_DEADLINE_S, deadline_s=STEP_DEADLINE_S, min_participants=3
)
BUG = "bug"
LABELS = ("round 1", "round 2")
FIRST_LIARS_BIT = 8  # liars add powers of two from this one on


class RecordedAttempts(Attempts):
    """Attempts that note who is blamed.

    Attributes:
        named: the sets of participants of which one is said to be at fault.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.named = []

    def _note(self, groups):
        self.named += [frozenset(self._present[i] for i in group) for group in groups]

    def _describe(self, failure):
        self._note(failure.blamed)
        return super()._describe(failure)

    def _note_blame(self, agreed, summand):
        self._note(agreed.blamed)
        super()._note_blame(agreed, summand)


@dataclass
class Site:
    """What became of a site.

    Attributes:
        sums: by label. members: by label, its member of the attempt that gave the sum.
        named: see `RecordedAttempts`.
        error: why it has ended. end_s: when, of the virtual clock. longest_s: when at the latest.
    """

    sums: dict[str, np.ndarray] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)
    named: list[frozenset[int]] = field(default_factory=list)
    error: str = ""
    end_s: float = 0.0
    longest_s: float = 0.0


class World:
    """Sites that make sums under several labels, one after the other.

    Attributes:
        sites: what became of each. liars, honest: their numbers.
        members: by (number of the attempt, number of the site), its member.
    """

    def __init__(self, n: int, liars: frozenset[int], lies, monkeypatch):
        """Play the sums to their end.

        Args:
            lies: of all liars (`liars.Lie`).
        """
        self.n = n
        self.liars = liars
        self.honest = frozenset(range(n)) - liars
        self.sites = [Site() for _ in range(n)]
        self.members: dict[tuple[int, int], Member] = {}
        self._lies = lies
        self._identities = [Ed25519PrivateKey.generate() for _ in range(n)]
        self._keys = [public_bytes(identity) for identity in self._identities]
        self._transports = VirtualTransport.set_of(n, monkeypatch)
        monkeypatch.setattr(attempts, "Member", self._recorded)
        threads = [threading.Thread(target=self._play, args=(i,), daemon=True) for i in range(n)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _recorded(self, parameters, me, identity, integers, **options):
        member = Member(parameters, me, identity, integers, **options)
        self.members[parameters.attempt, self._keys.index(parameters.members[me])] = member
        return member

    def _play(self, i: int) -> None:
        transport = self._transports[i]
        made = RecordedAttempts(transport, CONFIG, self._identities[i], self._keys, b"session")
        if i in self.liars:
            transport.on_send = Liar(
                [lie for lie in self._lies if lie.liar == i],
                lambda: self.members[made._made, i],
                lambda: {at: self._identities[p] for at, p in enumerate(made.present) if p in self.liars},
                STEP_DEADLINE_S,
            )
        site = self.sites[i]
        marks = MemoryMarks()
        try:
            for label in LABELS:
                made.arrived = None
                site.sums[label] = made.agree(self._summand(i, label, marks)).values
                site.members[label] = self.members[made._made, i]
        except FedSpeedError as error:
            site.error = str(error)
        except Exception:  # of a liar's member: what it does to itself does not matter
            if i in self.honest:
                site.error = f"{BUG}: {traceback.format_exc()}"
        finally:
            site.named = made.named
            site.longest_s = len(LABELS) * (2 * CONFIG.deadline_s + made.max_wait_s)
            site.end_s = transport.now
            transport.close()

    def _summand(self, i: int, label: str, marks: MemoryMarks) -> Summand:
        """Return what a site adds: a power of two, so that a sum tells which honest sites are in it."""
        value = 1 << (i if i in self.honest else i + FIRST_LIARS_BIT)
        return Summand(
            number=LABELS.index(label),
            label=label,
            length=self.n,
            integers=lambda: np.full(self.n, value, np.uint32),
            vector=b"vector",
            marks=marks,
        )

    def opened(self) -> dict[bytes, list[frozenset[int]]]:
        """Return by subject the honest sets of the sums of updates that somebody can open: all honest members
        have revealed the secrets of their self masks.
        """
        by_attempt = defaultdict(list)
        for (_, i), member in self.members.items():
            if i in self.honest:
                by_attempt[member.parameters].append(member)
        sets = defaultdict(list)
        for parameters, members in by_attempt.items():
            honest = frozenset(map(self._keys.index, parameters.members)) - self.liars
            revealed = [member for member in members if member.me in member._self_secrets]
            if len(revealed) == len(honest) and not any(member.skip_reasons for member in revealed):
                sets[parameters.subject].append(honest)
        return sets

    def check(self) -> None:
        """Raise AssertionError where something that must hold does not."""
        for i in self.honest:
            site = self.sites[i]
            assert not site.error.startswith(BUG), site.error
            assert site.end_s <= site.longest_s
            for group in site.named:
                assert group & self.liars, f"{i} names {sorted(group)}, who are honest"
        for label in LABELS:
            self._check_sums(label, [self.sites[i] for i in self.honest if label in self.sites[i].sums])
        for sets in self.opened().values():
            assert all(honest == self.honest for honest in sets), f"an update is opened over {sets}"

    def _check_sums(self, label: str, sites: list[Site]) -> None:
        """Check that honest sites have the same sum, with the updates of all of them or of none.

        A chunk with nobody but liars on its path may hold anything: they can open it as they like.
        """
        everybody = sum(1 << i for i in self.honest)
        for site in sites:
            assert np.array_equal(site.sums[label], sites[0].sums[label]), f"{label}: {sites}"
            member = site.members[label]
            liars = {at for at, key in enumerate(member.parameters.members) if key in self._keys_of_liars}
            seen = [c for c, path in enumerate(member.plan.paths) if not liars.issuperset(path)]
            width = member.plan.chunk_length
            values = site.sums[label] & ((1 << FIRST_LIARS_BIT) - 1)
            for chunk in seen:
                found = set(values[chunk * width : (chunk + 1) * width].tolist())
                assert found <= {0 if member.skip_reasons else everybody}, f"{label}: {site.sums[label]}"

    @property
    def _keys_of_liars(self) -> set[bytes]:
        return {self._keys[i] for i in self.liars}
