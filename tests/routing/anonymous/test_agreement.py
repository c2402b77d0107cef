"""A member that says one thing to one peer and another thing to another while members agree on how an attempt
ends: the honest ones never end it differently, and never name an honest one alone.
"""

from dataclasses import replace

import pytest

from fedspeed.routing.anonymous.crypto import DIGEST, SIGNATURE
from fedspeed.routing.anonymous.lockstep import play
from fedspeed.routing.anonymous.phases import AgreedSum, AttemptFailed
from fedspeed.routing.anonymous.protocol import Member
from fedspeed.routing.anonymous.recovery import RecoveryMessage
from fedspeed.routing.anonymous.statements import LABELS, RECORD, statement
from tests.routing.anonymous.cheats import FalsifyingOwner, FlippingRelay
from tests.routing.anonymous.parties import Parties

LIAR = 3
HONEST = (0, 1, 2)


class Endless(Exception):
    """The honest members have exchanged more messages than an attempt may take."""


def bounded(change, limit: int = 60):
    """Return `change` for `play`, which raises Endless after as many phases."""
    phases = []

    def change_and_count(phase, messages):
        phases.append(phase)
        if len(phases) > limit:
            raise Endless
        if all((LIAR, i) in messages for i in HONEST):  # else some are still on their way to the recovery
            change(phase, messages)

    return change_and_count


def recovery_of(messages, member: int, receiver: int, **changes) -> None:
    """Change fields of the recovery message that one member sends to another."""
    message = RecoveryMessage.unpack(messages[member, receiver], 4)
    messages[member, receiver] = replace(message, **changes).pack(4)


def check_honest(results) -> None:
    """Check that honest members end alike, where they do not end the run, and that none is named alone."""
    ends = [results[i] for i in HONEST]
    assert all(isinstance(end, (AgreedSum, AttemptFailed)) for end in ends)
    named = {group for end in ends for group in end.blamed}
    assert all(LIAR in group for group in named), named
    retries = [end for end in ends if isinstance(end, AttemptFailed) and not end.fatal]
    excluded = {(end.lost, tuple(g for g in end.blamed if len(g) == 1)) for end in retries}
    assert len(excluded) <= 1, "they go on with different members"
    sums = [end for end in ends if isinstance(end, AgreedSum)]
    assert not (retries and sums)
    assert len({end.convicted for end in sums}) <= 1, "they go on with different members"


@pytest.mark.parametrize("victims", [{0}, {0, 2}])
def test_complaints_about_different_chunks_name_no_honest_member(victims):
    """Transcripts of one chunk, read as those of another, would look like forgeries."""
    parties = Parties(4, kinds={LIAR: FlippingRelay})

    def change(phase, messages):
        if phase == "recover" and min(members[0].complaints | members[1].complaints | members[2].complaints):
            split.append(phase)
            for i in victims:
                recovery_of(messages, LIAR, i, complaint=0)

    split = []
    for number in range(20):  # in which the paths differ
        members = parties.attempt(number)
        check_honest(play(members, bounded(change)).results)
    assert split


@pytest.mark.parametrize("victims", [{0}, {0, 2}])
def test_different_transcripts_do_not_split_the_honest_members(victims):
    """Some would go on without the liar, the others with it."""
    members = Parties(4, kinds={LIAR: FlippingRelay}).attempt()

    def change(phase, messages):
        if phase == "blame":
            size = len(members[0].transcript(0).pack())
            for i in victims:
                start = size - 2 * 4 * DIGEST  # the digests of what it has received
                text = messages[LIAR, i]
                messages[LIAR, i] = text[:start] + bytes(4 * DIGEST) + text[start + 4 * DIGEST :]

    results = play(members, bounded(change)).results
    check_honest(results)
    assert all(results[i].fatal for i in HONEST)


@pytest.mark.parametrize("lost", [{LIAR}, {200}])
def test_a_member_that_claims_not_to_hear_itself_keeps_nobody_waiting(lost):
    """A claim about itself, or about a number that nobody has, contradicts nobody."""

    def change(phase, messages):
        if phase == "collect":
            messages[LIAR, 0] = messages[LIAR, 0][:-1] + b"?"
        if phase == "recover":
            packed = sum(1 << i for i in lost).to_bytes(32, "big")
            for i in (*HONEST, LIAR):  # also to itself, so that it goes on claiming it
                messages[LIAR, i] = packed + messages[LIAR, i][32:]

    check_honest(play(Parties(4).attempt(), bounded(change)).results)


def test_a_proof_that_the_liar_gives_to_one_member_only_reaches_all():
    """All convict it by the proof, and name it alone; else they would differ about whether it is lost."""
    parties = Parties(4)
    members = parties.attempt()
    other = b"?" * DIGEST
    place = 2 * (LABELS.index("collect") * 4 + LIAR) * RECORD

    def change(phase, messages):
        if phase == "confirm":
            messages[LIAR, 1] = messages[LIAR, 1][:DIGEST] + bytes(SIGNATURE)
        if phase == "recover":
            identity = parties.identities[LIAR]
            record = other + identity.sign(statement("collect", members[0].context, other))
            table = RecoveryMessage.unpack(messages[LIAR, 0], 4).statements
            recovery_of(messages, LIAR, 0, statements=table[:place] + record + table[place + RECORD :])

    results = play(members, bounded(change)).results
    check_honest(results)
    for i in HONEST:
        assert results[i].blamed == (frozenset({LIAR}),) and not results[i].fatal, results[i]


def test_accusations_that_do_not_reach_all_leave_nobody_out():
    """All accuse the owner that has opened its chunks falsely, but only who hears them all can know."""
    members = Parties(4, kinds={LIAR: FalsifyingOwner}).attempt()

    def change(phase, messages):
        if phase == "redone":
            messages[LIAR, 0] = b""

    results = play(members, bounded(change)).results
    check_honest(results)
    assert results[1].blamed == (frozenset({LIAR}),) != results[0].blamed


class Withholder(Member):
    """Keeps the secret of its self mask to itself until the others have given up for want of it."""

    asked = 0

    def _reveal_own_secret(self):
        self.asked += 1
        return super()._reveal_own_secret() if self.asked > 2 else self._self_secret


@pytest.mark.parametrize("committed", [True, False])
def test_a_member_that_is_kept_from_giving_up_does_not_go_on_with_the_liar_alone(committed):
    """The last of three members withholds its secret, or its signature, until member 1 has given up, and asks
    member 0 to stay. That one would end with a sum that member 1 goes on without, or try again without it.
    """
    liar = 2

    def change(phase, messages):
        phases.append(phase)
        if phase == "confirm":
            for i in (0, 1) if committed else (0, 1, liar):
                unsigned = messages[liar, i][:DIGEST] + bytes(SIGNATURE)
                messages[liar, i] = None if committed else unsigned
        if phase == "void" and phases.count("void") == 1:
            messages[liar, 0] = None
            messages[liar, liar] = None

    phases = []
    results = play(Parties(3, kinds={liar: Withholder}).attempt(), change).results
    assert isinstance(results[1], AttemptFailed) and not results[1].fatal and results[1].settled == committed
    assert isinstance(results[0], AttemptFailed) and results[0].fatal, results[0]
    assert "member 1 has ended the attempt or the run" in str(results[0])
