"""Coalitions that lie after the set of updates is committed: about secrets and contributions, and by making
others sum one round twice.
"""

import numpy as np
import pytest

from fedspeed.routing.anonymous import commitment
from fedspeed.routing.anonymous.announcement import commit_to_secret
from fedspeed.routing.anonymous.crypto import KEY
from fedspeed.routing.anonymous.lockstep import Kill, play
from fedspeed.routing.anonymous.masks import remove_self_masks
from fedspeed.routing.anonymous.phases import AgreedSum, AttemptFailed
from fedspeed.routing.anonymous.settlement import Mark, MemoryMarks, announced_mark, set_digest
from fedspeed.routing.anonymous.statements import statement
from tests.routing.anonymous.coalitions import alone, check, coalitions, liar
from tests.routing.anonymous.parties import Parties

FALSE = b"\1" * KEY


def false_secret(member, receiver, message):
    """Sign another secret than the member has committed to."""
    signed = statement("unmask", member.context, commit_to_secret(FALSE))
    return FALSE + member._identity.sign(signed)


def no_own_secret(member, receiver, message):
    """Leave out the member's own secret where all send those that they know."""
    member._self_secrets.pop(member.me, None)
    start = KEY * member.me
    return message[:start] + bytes(KEY) + message[start + KEY :]


def nothing(member, receiver, message):
    """Send zeros."""
    return bytes(len(message))


WITHHOLDING = {"unmask": nothing, "secrets": no_own_secret}


@pytest.mark.parametrize("turn", range(2))
def test_whoever_signs_a_false_secret_is_convicted_alone(turn):
    changes = {"unmask": false_secret, "secrets": no_own_secret}
    for n, liars, honest in coalitions(turn):
        results = play(Parties(n, kinds=dict.fromkeys(liars, liar(changes))).attempt()).results
        check(results, liars, ended=False)
        assert all(alone(results[i]) == liars for i in honest), (n, liars, results)


@pytest.mark.parametrize("turn", range(2))
def test_a_secret_that_is_true_for_one_member_is_known_to_all(turn):
    """The others convict its owner, and all have the sum, as far as enough members are left."""
    for n, liars, honest in coalitions(turn):
        deceived = set(honest[1:])
        changes = {"unmask": false_secret}
        parties = Parties(n, kinds=dict.fromkeys(liars, liar(changes, deceived)), threshold=2)
        results = play(parties.attempt()).results
        check(results, liars)
        for i in honest:
            assert alone(results[i]) == liars or "both stored the same sums" in str(results[i])
            if len(liars) == 1:
                assert np.array_equal(results[i].values, parties.sum())


@pytest.mark.parametrize("pretends", [True, False])
def test_whoever_withholds_its_secret_is_named_by_all(pretends):
    """Nobody has proof of it, so nobody is left out; but the message says who it was.

    Args:
        pretends: whether it goes on as if all had its secret, so that the others have to recover again.
    """
    for n, liars, honest in coalitions(1, (3, 4, 5)):
        if pretends and len(liars) > 1:
            continue  # they would share each other's secrets
        everybody = frozenset(range(n))
        kind = liar(WITHHOLDING, everybody - liars if pretends else everybody)
        results = play(Parties(n, kinds=dict.fromkeys(liars, kind)).attempt()).results
        check(results, liars, ended=False)
        for i in honest:
            assert results[i].settled and results[i].fatal == pretends
            assert liars <= frozenset().union(*results[i].blamed)


@pytest.mark.parametrize("to_all", [True, False])
def test_a_false_contribution_to_the_comparison_changes_no_sum(to_all):
    for n, liars, honest in coalitions(1):
        changes = {"challenge": lambda member, receiver, message: FALSE}
        kind = liar(changes, None if to_all else {honest[0]})
        parties = Parties(n, kinds=dict.fromkeys(liars, kind))
        results = play(parties.attempt()).results
        check(results, liars, ended=True)
        for i in honest:
            assert np.array_equal(results[i].values, parties.sum())
            named = frozenset().union(*results[i].blamed)
            assert named & liars


def complain(member, receiver, message):
    """Complain about the first chunk."""
    member.complaints.add(0)
    return message


def test_nothing_leaves_before_the_commitment_that_rebuilds_the_secret_of_a_self_mask():
    """Shares of it used to leave with the first messages, and enough colluders could rebuild it."""
    for n, liars, honest in coalitions(0, (3, 5)):
        seen = []
        members = Parties(n, kinds=dict.fromkeys(liars, liar({"collect": complain}))).attempt()
        secrets = [members[i]._self_secret for i in honest]
        played = play(members, lambda phase, messages, seen=seen: seen.extend(messages.values()))
        check(played.results, liars, ended=False)
        assert "unmask" not in played.phases and "secrets" not in played.phases
        together = b"".join(seen)
        assert not any(secret in together for secret in secrets)
        assert not any(members[i]._self_secrets for i in honest)


# One round, summed over two sets.


class Round:
    """Attempts at one sum, whose members keep their settled marks.

    Attributes:
        members: of the last attempt. secrets: of self masks that the liars have seen in it, by member.
    """

    def __init__(self, parties, n):
        self._parties = parties
        self._marks = [MemoryMarks() for _ in range(n)]
        self.members = []
        self.secrets = {}

    def attempt(self, number, without=frozenset(), **lies):
        """Play an attempt; return the results by the numbers that members have in it."""
        present = [i for i in range(len(self._marks)) if i not in without]
        self.members = self._parties.attempt(number, without)
        members = set_digest(self.members[0].parameters.members)
        for member, i in zip(self.members, present, strict=True):
            member._mark = announced_mark(self._marks[i].get("round 7"), b"vector")
            member._settle = lambda i=i: self._marks[i].put("round 7", Mark(members, b"vector"))
        self.secrets = {}

        def listen(phase, messages):
            if phase == "unmask":
                self.secrets = {i: text[:KEY] for (i, _), text in messages.items()}

        return play(self.members, listen, **lies).results

    def opened(self, owner):
        """Return what a member can open alone: [length] int64, -1 in chunks whose sums it does not have."""
        member = self.members[owner]
        secrets = {**self.secrets, owner: member._self_secret}
        width = member.plan.chunk_length
        values = np.full(member.plan.chunks * width, -1, np.int64)
        for chunk, masked in member.sums.items():
            total = masked.copy()
            remove_self_masks(member.cipher, secrets, chunk, total)
            values[chunk * width : (chunk + 1) * width] = total
        return values[: member.parameters.length]


def without_marks(monkeypatch):
    monkeypatch.setattr(commitment, "reasons_to_skip", lambda marks, members: frozenset())


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("n", [4, 5, 7])
@pytest.mark.parametrize("again", ["liar withholds", "victim dies"])
def test_two_sums_of_one_round_never_differ_by_an_honest_members_update(n, again, marked, monkeypatch):
    """The last member lies: it withholds its secret, so that the others try again, but opens the sum for
    itself. Member 0 is missing in the next attempt. Without marks the difference is its update, exactly.
    """
    if not marked:
        without_marks(monkeypatch)

    kind = liar(WITHHOLDING, frozenset(range(n)))
    parties = Parties(n, kinds={n - 1: kind}, length=600, chunk_length=4)
    attempts = Round(parties, n)
    first = attempts.attempt(0, kills=[Kill(0, "recover")] if again == "victim dies" else [])
    assert all(isinstance(first[i], AttemptFailed) and first[i].settled for i in range(1, n - 1))
    before = attempts.opened(n - 1)
    second = attempts.attempt(1, frozenset({0}))
    assert all(isinstance(result, AttemptFailed) for result in second[:-1])
    assert all(bool(member.skip_reasons) == marked for member in attempts.members[:-1])
    after = attempts.opened(n - 2)

    both = (before >= 0) & (after >= 0)
    assert both.any() and np.array_equal(before[before >= 0], parties.sum()[before >= 0])
    difference = (before - after)[both].astype(np.uint32)
    if marked:
        assert not after[both].any(), "all add zeros"
    assert np.array_equal(difference, parties.integers[0][both]) == (not marked)


def test_the_same_set_may_sum_the_same_update_again():
    """Only one sum of it is ever opened, however often."""
    parties = Parties(4)
    attempts = Round(parties, 4)
    for number in range(2):
        for result in attempts.attempt(number):
            assert isinstance(result, AgreedSum) and np.array_equal(result.values, parties.sum())
            assert not result.skip_reasons
