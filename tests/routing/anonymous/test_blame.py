"""Messages changed on their way, and members that cheat: both are found before anything is unmasked, and the
right members are blamed.
"""

import random

import numpy as np
import pytest

from fedspeed.routing.anonymous import cells
from fedspeed.routing.anonymous.crypto import DIGEST, SIGNATURE
from fedspeed.routing.anonymous.lockstep import play
from fedspeed.routing.anonymous.phases import AgreedSum, AttemptFailed
from fedspeed.routing.anonymous.recovery import contradictions
from tests.routing.anonymous.cheats import (
    BadSource,
    DoublingRelay,
    EquivocatingOwner,
    FalsifyingOwner,
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
def test_a_member_that_does_not_confirm_to_some_commits_all_by_the_others(receivers):
    """Whoever has all signatures shows them to the rest."""
    parties = Parties(5)

    def withhold(phase, messages):
        if phase == "confirm":
            for i in receivers:
                messages[4, i] = messages[4, i][:DIGEST] + bytes(SIGNATURE)

    results = play(parties.attempt(), withhold).results
    assert all(np.array_equal(result.values, parties.sum()) for result in results)


def test_a_false_digest_in_a_confirmation_helps_nobody():
    """Member 4 has signed the right one, and has the signatures of all: it shows them."""
    parties = Parties(5)

    def change(phase, messages):
        if phase == "confirm":
            for i in (0, 1, 2, 3):
                messages[4, i] = bytes(DIGEST) + messages[4, i][DIGEST:]

    results = play(parties.attempt(), change).results
    assert all(np.array_equal(result.values, parties.sum()) for result in results)


@pytest.mark.parametrize("cut_in", ["announce", "hop 0", "collect", "confirm"])
def test_a_truncated_message_counts_as_none(cut_in):
    """Nobody can tell whether member 2 sent too little or member 0 only says so, and nobody goes on without a
    member that it hears: the attempt ends for all, and names the two.
    """

    def cut(phase, messages):
        if phase == cut_in:
            messages[2, 0] = messages[2, 0][:-1]

    results = play(Parties(6).attempt(), cut).results
    assert all(isinstance(result, AttemptFailed) and result.fatal for result in results)
    for i in (1, 3, 4, 5):
        assert results[i].blamed == (frozenset({0, 2}),)


@pytest.mark.parametrize(
    ("claims", "pairs"),
    [
        ([{3, 4}, {3, 4}, set(), set(), set()], [{0, 3}, {0, 4}, {1, 3}, {1, 4}]),
        ([{3}, set(), set(), {0}, set()], [{0, 3}]),
        ([{5}, {5}, {5}, {5}, {5}], []),
    ],
)
def test_a_claim_against_a_member_that_answers_names_both(claims, pairs):
    """Members 0 and 1 claim that 3 and 4, who answer everybody, are lost; member 5 is."""
    found = contradictions({i: frozenset(claim) for i, claim in enumerate(claims)})
    assert found == [frozenset(pair) for pair in pairs]


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


def test_an_owner_that_forges_a_masked_sum_only_adds_to_its_own_update():
    """It had to choose what it adds before any sum was opened, as it chooses its update."""
    parties = Parties(4, kinds={2: ForgingOwner})
    results = play(parties.attempt()).results
    assert all(isinstance(result, AgreedSum) and not result.blamed for result in results)
    difference = results[0].values - parties.sum()
    assert set(difference.tolist()) == {0, 1}
    assert all(np.array_equal(result.values, results[0].values) for result in results)


@pytest.mark.parametrize("guilty", range(4))
@pytest.mark.parametrize("mode", [{}, {"relays": 0}, {"masked": False}])
def test_an_owner_that_opens_its_chunks_falsely_is_named_alone_and_the_sum_is_right(guilty, mode):
    parties = Parties(4, kinds={guilty: FalsifyingOwner}, **mode)
    results = play(parties.attempt()).results
    for i, result in enumerate(results):
        assert np.array_equal(result.values, parties.sum()), result
        assert i == guilty or result.blamed == (frozenset({guilty}),)


@pytest.mark.parametrize("victims", [{0}, {1, 3}])
def test_an_owner_that_opens_its_chunks_otherwise_for_some_is_found_by_the_comparison(victims):
    kind = type("TwoFaced", (FalsifyingOwner,), {"victims": victims})
    parties = Parties(4, kinds={2: kind})
    for result in play(parties.attempt()).results:
        assert np.array_equal(result.values, parties.sum())
        assert result.blamed == tuple(frozenset({i, 2}) for i in sorted(victims))


def test_a_member_that_reveals_a_wrong_secret_is_convicted():
    """Its own signature says which secret it has revealed; the committed sum cannot be opened."""
    parties = Parties(4, kinds={1: Pretender})
    results = play(parties.attempt()).results
    for i in (0, 2, 3):
        assert results[i].blamed == (frozenset({1}),) and results[i].settled and not results[i].fatal
    again = play(parties.attempt(1, frozenset({1}))).results
    assert all(np.array_equal(result.values, parties.sum(frozenset({1}))) for result in again)


def test_a_backup_with_other_sums_is_found_before_it_is_needed():
    assert all_blame(play(Parties(4, kinds={2: ForgetfulOwner}).attempt()).results, frozenset({2, 3}))


def test_different_lists_for_different_members_convict_their_owner():
    results = play(Parties(4, kinds={1: EquivocatingOwner}).attempt()).results
    assert all_blame([results[i] for i in (0, 2, 3)], frozenset({1}))
    assert "member 1 signed different messages for different members" in str(results[0])


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
