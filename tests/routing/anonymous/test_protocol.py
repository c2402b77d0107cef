"""The anonymous sum, played in one process: exact sums, nothing lost with a member, the guilty named, nothing
told too early.
"""

import numpy as np
import pytest

from fedspeed.routing.anonymous.lockstep import Kill, play
from fedspeed.routing.anonymous.phases import AgreedSum, AttemptFailed
from fedspeed.routing.anonymous.traffic import traffic
from tests.routing.anonymous.parties import Parties

MODES = {"mask": {"relays": 0}, "mix": {"masked": False}, "mix+mask": {}}
PHASES = (
    "announce",
    "reveal",
    "hop 0",
    "hop 1",
    "hop 2",
    "collect",
    "vote",
    "confirm",
    "unmask",
    "sums",
    "done",
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [3, 5, 9])
@pytest.mark.parametrize("words", [1, 50, 1000])
def test_everybody_gets_the_exact_sum(n, mode, words):
    parties = Parties(n, words, **MODES[mode])
    played = play(parties.attempt())
    for end in played.results:
        np.testing.assert_array_equal(end.values, parties.sum())


@pytest.mark.parametrize("cipher", ["aes-128-gcm", "chacha20-poly1305"])
def test_both_ciphers(cipher):
    parties = Parties(3, 500, cipher=cipher)
    assert all(np.array_equal(end.values, parties.sum()) for end in play(parties.attempt()).results)


@pytest.mark.slow  # sixteen, over a real exchange, are in test_exchange.py
def test_sixty_four_members():
    parties = Parties(64, 128, chunk_length=2, relays=3)
    assert all(np.array_equal(end.values, parties.sum()) for end in play(parties.attempt()).results)


@pytest.mark.parametrize("mode", MODES)
def test_who_sends_how_much_follows_from_public_facts(mode):
    """The same bytes between the same members for other data, and for none; and they are those of
    `traffic`.
    """
    parties = Parties(5, 200, **MODES[mode])
    seen = []

    def count(state, messages):
        sizes = np.array([[len(messages[i, j]) for j in range(5)] for i in range(5)])
        np.testing.assert_array_equal(
            sizes,
            traffic(members[0].parameters, members[0].plan)[state]
            if state not in ("announce", "reveal")
            else sizes,
        )
        seen.append(sizes)

    members = parties.attempt()
    play(members, count)
    total = sum(seen)
    parties.vectors = [v * 0 for v in parties.vectors]
    seen.clear()
    members = parties.attempt()
    play(members, count)
    np.testing.assert_array_equal(sum(seen).sum(), total.sum())
    np.testing.assert_array_equal(sum(seen).sum(axis=1), total.sum(axis=1))


# Losses.


@pytest.mark.parametrize("state", PHASES)
@pytest.mark.parametrize("dead", range(4))
@pytest.mark.parametrize("heard", [set(), {0}, {1, 3}, {0, 1, 2, 3}])
def test_a_member_killed_in_any_state(state, dead, heard):
    """Either all survivors have the sum of all four, or none has any, and the next attempt gives that of the
    survivors.
    """
    parties = Parties(4)
    played = play(parties.attempt(), kills=[Kill(dead, state, frozenset(heard - {dead}))])
    ends = [end for i, end in enumerate(played.results) if i != dead]
    assert played.results[dead] is None and len({type(end) for end in ends}) == 1
    if isinstance(ends[0], AgreedSum):
        assert all(np.array_equal(end.values, parties.sum()) for end in ends)
        assert state in ("confirm", "unmask", "sums", "done"), "a sum without everyone's signature"
    else:
        assert {end.lost for end in ends} == {frozenset({dead})} and not any(end.fatal for end in ends)
        assert state not in ("unmask", "sums", "done"), "a set that was committed was given up"
        again = play(parties.attempt(1, frozenset({dead})))
        assert all(np.array_equal(end.values, parties.sum(frozenset({dead}))) for end in again.results)


@pytest.mark.parametrize("state", ["hop 1", "confirm", "unmask", "sums"])
def test_two_members_killed_one_after_the_other(state):
    parties = Parties(5)
    kills = [Kill(1, state, frozenset({0})), Kill(3, "recover", frozenset({2}))]
    ends = [end for i, end in enumerate(play(parties.attempt(), kills=kills).results) if i not in (1, 3)]
    assert len({type(end) for end in ends}) == 1
    if isinstance(ends[0], AgreedSum):
        assert all(np.array_equal(end.values, parties.sum()) for end in ends)
    else:
        assert {end.lost for end in ends} == {frozenset({1, 3})}


def test_too_few_survivors_stop():
    parties = Parties(4)
    ends = play(parties.attempt(), kills=[Kill(0, "sums"), Kill(1, "sums")]).results
    assert all(end.fatal and "only 2 of 4 members are left, 3 are needed" in str(end) for end in ends[2:])


def test_an_owner_and_the_keeper_of_its_sums_lost_together():
    parties = Parties(6)
    ends = play(parties.attempt(), kills=[Kill(2, "sums"), Kill(3, "sums")]).results
    left = [end for i, end in enumerate(ends) if i not in (2, 3)]
    assert all(
        isinstance(end, AttemptFailed) and end.fatal and "both stored the same sums" in str(end)
        for end in left
    )
