"""Messages changed on their way, and members that cheat: both are found before anything is unmasked, and the
right members are blamed.
"""

import random

import numpy as np
import pytest

from fedspeed.routing.anonymous import cells
from fedspeed.routing.anonymous.crypto import DIGEST
from fedspeed.routing.anonymous.lockstep import play
from fedspeed.routing.anonymous.phases import AttemptFailed
from fedspeed.routing.anonymous.recovery import members_to_exclude
from tests.routing.anonymous.cheats import (
    BadSource,
    DoublingRelay,
    EquivocatingOwner,
    FlippingRelay,
    ForgetfulOwner,
    ForgingOwner,
    LateChooser,
    LyingOwner,
    Pretender,
    Slanderer,
    TwinSource,
    WeakKeys,
    WeakMaskKey,
)
from tests.routing.anonymous.parties import Parties


def all_blame(results, *groups: frozenset[int]) -> bool:
    """Return whether the attempt has failed for all members, with these groups blamed."""
    return all(isinstance(result, AttemptFailed) and result.blamed == groups for result in results)


def flipped(message: bytes) -> bytes:
    """Return a message with a bit of its last byte changed."""
    return message[:-1] + bytes([message[-1] ^ 1])


# Messages that are changed on their way.


class Wire:
    """A network that changes one message between two members, once.

    Attributes:
        edge: sender and receiver of that message; None before.
    """

    def __init__(self, kind: str, seed: int, members):
        self.kind = kind
        self.random = random.Random(seed)
        self.members = members
        self.edge = None
        self.phase = self.random.choice(["hop 0", "hop 1", "hop 2"])

    def __call__(self, phase, messages):
        if phase != self.phase or self.edge:
            return
        hop = int(phase[-1])
        size = cells.size(self.members[0].plan, hop)
        # Cells of one chunk, which travel together: to swap two of these changes nothing.
        together = 1 if hop == 0 else len(self.members)
        fewest = {"replay": 2, "swap": together + 1}.get(self.kind, 1)
        full = [edge for edge, text in messages.items() if len(set(edge)) == 2 and len(text) >= size * fewest]
        if full:
            edge = self.random.choice(full)
            messages[edge] = self.changed(messages[edge], size, together)
            self.edge = frozenset(edge)

    def changed(self, message: bytes, size: int, together: int) -> bytes:
        """Return the message with one or two of its cells changed."""
        text = bytearray(message)
        starts = range(0, len(text), size)
        start = self.random.choice(starts)
        if self.kind == "tamper":
            text[start + self.random.randrange(size)] ^= 1 << self.random.randrange(8)
        elif self.kind == "drop":  # noise takes its place: a message that is too short is another case
            text[start : start + size] = self.random.randbytes(size)
        elif self.kind == "replay":
            other = self.random.choice([s for s in starts if s != start])
            text[start : start + size] = text[other : other + size]
        elif self.kind == "swap":
            width = size * together
            other = self.random.choice([s for s in starts if s // width != start // width])
            first = text[start : start + size]
            text[start : start + size] = text[other : other + size]
            text[other : other + size] = first
        return bytes(text)


# More than a thousand cases, with the slow ones.
@pytest.mark.parametrize("seeds", [range(75), pytest.param(range(75, 300), marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["tamper", "drop", "replay", "swap"])
def test_a_changed_message_is_found_and_its_edge_is_blamed(kind, seeds):
    changed = 0
    for seed in seeds:
        members = Parties(3 + seed % 3, 80 + seed % 50, seed, chunk_length=8).attempt()
        wire = Wire(kind, seed, members)
        played = play(members, wire)
        if not wire.edge:
            continue
        changed += 1
        assert all_blame(played.results, wire.edge), f"seed {seed}: {wire.edge} was changed"
        assert not any(result.fatal for result in played.results)
        assert "unmask" not in played.phases
    assert changed > 0.6 * len(seeds)


@pytest.mark.parametrize("receivers", [{0, 2}, {0, 1}, {3}])
def test_a_complaint_to_some_members_keeps_all_from_committing(receivers):
    def complain(phase, messages):
        if phase == "vote":
            for i in receivers:
                messages[4, i] = messages[4, i][:-4] + (0).to_bytes(4, "big")

    results = play(Parties(5).attempt(), complain).results
    assert all(
        isinstance(result, AttemptFailed) and not result.fatal and not result.lost for result in results
    )


def test_a_vote_for_other_lists_keeps_all_from_committing():
    def change(phase, messages):
        if phase == "vote":
            messages[4, 2] = bytes(DIGEST) + messages[4, 2][DIGEST:]

    results = play(Parties(5).attempt(), change).results
    assert all(isinstance(result, AttemptFailed) and not result.lost for result in results)
    assert [result.blamed for result in results] == [(), (), (frozenset({2, 4}),), (), ()]


@pytest.mark.parametrize("cut_in", ["announce", "hop 0", "collect", "confirm"])
def test_a_truncated_message_counts_as_none(cut_in):
    """Nobody can tell whether member 2 sent too little or member 0 only says so: both are left out, and
    neither is blamed.
    """
    parties = Parties(6)

    def cut(phase, messages):
        if phase == cut_in:
            messages[2, 0] = messages[2, 0][:-1]

    results = play(parties.attempt(), cut).results
    assert isinstance(results[0], AttemptFailed) and isinstance(results[2], AttemptFailed)
    for i in (1, 3, 4, 5):
        if cut_in == "confirm":  # they have the signature of member 2
            assert np.array_equal(results[i].values, parties.sum())
        else:
            assert all_blame([results[i]]) and results[i].lost == frozenset({0, 2})


@pytest.mark.parametrize(
    ("claims", "excluded"),
    [
        ([{3, 4}, {3, 4}, set(), set(), set()], {0, 1, 3, 4}),
        ([{3}, {3}, {3}, set(), set()], {3}),
        ([{3}, set(), set(), {0}, set()], {0, 3}),
    ],
)
def test_colluders_cannot_have_others_excluded(claims, excluded):
    """Members 0 and 1 claim that 3 and 4, who answer everybody, are lost: it costs them as many."""
    assert members_to_exclude({i: frozenset(claim) for i, claim in enumerate(claims)}) == excluded


def test_an_owner_cannot_have_a_member_blamed_by_a_list_without_its_signature():
    def change(phase, messages):
        if phase == "collect":
            messages[0, 3] = flipped(messages[0, 3])  # in the signature

    assert all_blame(play(Parties(5).attempt(), change).results, frozenset({0, 3}))


@pytest.mark.parametrize("changed_in", ["announce", "reveal"])
def test_what_one_member_alone_has_seen_ends_the_attempt_for_all(changed_in):
    """Otherwise the member that left would count as lost."""

    def change(phase, messages):
        if phase == changed_in:
            messages[1, 2] = flipped(messages[1, 2])

    results = play(Parties(5).attempt(), change).results
    assert all_blame(results, frozenset({1, 2}))
    assert not any(result.lost or result.fatal for result in results)


# Members that cheat.


@pytest.mark.parametrize("kind", [FlippingRelay, DoublingRelay, BadSource, LyingOwner, Slanderer])
@pytest.mark.parametrize("guilty", range(4))
def test_a_member_that_cheats_is_blamed_alone(kind, guilty):
    results = play(Parties(4, kinds={guilty: kind}).attempt()).results
    assert all_blame(results, frozenset({guilty})), results


def test_sources_that_share_a_serial_are_blamed_and_not_the_owner():
    results = play(Parties(5, kinds={0: TwinSource, 1: TwinSource}).attempt()).results
    assert all_blame(results, frozenset({0, 1}))


@pytest.mark.parametrize("kind", [WeakKeys, WeakMaskKey])
def test_a_public_key_of_small_order_is_its_members_fault(kind):
    results = play(Parties(4, kinds={2: kind}).attempt()).results
    assert all_blame([result for i, result in enumerate(results) if i != 2], frozenset({2}))


def test_a_contribution_to_the_beacon_must_be_the_committed_one():
    results = play(Parties(4, kinds={1: LateChooser}).attempt()).results
    assert all_blame(results, frozenset({1}))
    for i in (0, 2, 3):
        assert "another contribution to the beacon" in str(results[i])


def test_a_forged_sum_fails_the_checksum():
    results = play(Parties(4, kinds={2: ForgingOwner}).attempt()).results
    for result in results:
        assert isinstance(result, AttemptFailed) and "not those of what was sent" in str(result)


def test_a_member_that_reveals_a_wrong_secret_is_not_needed():
    """Its update is committed: the others reconstruct its secret from their shares."""
    parties = Parties(4, kinds={1: Pretender})
    results = play(parties.attempt()).results
    assert all(np.array_equal(results[i].values, parties.sum()) for i in (0, 2, 3))


def test_a_backup_with_other_sums_is_found_before_it_is_needed():
    assert all_blame(play(Parties(4, kinds={2: ForgetfulOwner}).attempt()).results, frozenset({2, 3}))


def test_different_lists_for_different_members_are_found():
    results = play(Parties(4, kinds={1: EquivocatingOwner}).attempt()).results
    assert all(isinstance(result, AttemptFailed) for result in results)
    assert all(1 in group for result in results for group in result.blamed)
    assert any("different lists" in str(result) for result in results)


def test_another_roster_or_other_settings_are_refused_at_the_first_message():
    parties = Parties(3)
    one = parties.attempt()
    other = parties.attempt(settings=b"another base model")
    results = play([one[0], one[1], other[2]]).results
    assert "member 2 announced itself with other settings" in str(results[0])
    assert results[0].blamed == (frozenset({2}),)
    old = parties.attempt(number=7)
    results = play([one[0], one[1], old[2]]).results
    assert all(isinstance(result, AttemptFailed) for result in results), "an announcement of another attempt"
