"""The anonymous sum, played in one process: its sums are exact, its traffic follows from public facts, and
survivors agree wherever members are lost.
"""

import numpy as np
import pytest

from fedspeed.routing.anonymous.lockstep import Kill, play
from fedspeed.routing.anonymous.phases import AgreedSum, AttemptFailed
from fedspeed.routing.anonymous.traffic import traffic
from tests.routing.anonymous.parties import Parties


def all_have(results, total) -> bool:
    """Return whether all members have ended with this sum."""
    return all(isinstance(r, AgreedSum) and np.array_equal(r.values, total) for r in results)


MODES = {"mask": {"relays": 0}, "mix": {"masked": False}, "mix+mask": {}}
PHASES = (
    "announce",
    "reveal",
    "hop 0",
    "hop 1",
    "hop 2",
    "collect",
    "confirm",
    "unmask",
    "sums",
    "challenge",
    "done",
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [3, 5, 9])
@pytest.mark.parametrize("length", [1, 50, 1000])
def test_all_members_get_the_exact_sum(n, mode, length):
    parties = Parties(n, length, **MODES[mode])
    assert all_have(play(parties.attempt()).results, parties.sum())


@pytest.mark.parametrize("cipher", ["aes-128-gcm", "chacha20-poly1305"])
def test_both_ciphers(cipher):
    parties = Parties(3, 500, cipher=cipher)
    assert all_have(play(parties.attempt()).results, parties.sum())


@pytest.mark.slow  # sixteen, over a real exchange, are in test_exchange.py
def test_sixty_four_members():
    parties = Parties(64, 128, chunk_length=2, relays=3)
    assert all_have(play(parties.attempt()).results, parties.sum())


@pytest.mark.parametrize("mode", MODES)
def test_the_traffic_follows_from_public_facts(mode):
    """Each phase has the bytes of `traffic`, and zeros cause as many as any other integers."""
    parties = Parties(5, 200, **MODES[mode])

    def sent():
        """Play an attempt, and return the bytes that each member has sent to each."""
        members = parties.attempt()
        seen = []

        def count(phase, messages):
            sizes = np.array([[len(messages[i, j]) for j in range(5)] for i in range(5)])
            if phase not in ("announce", "reveal"):  # the paths are known from here on
                expected = traffic(members[0].parameters, members[0].plan)[phase]
                np.testing.assert_array_equal(sizes, expected)
            seen.append(sizes)

        play(members, count)
        return sum(seen)

    first = sent()
    parties.integers = [own * 0 for own in parties.integers]
    np.testing.assert_array_equal(sent().sum(axis=1), first.sum(axis=1))


# Losses.


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dead", range(4))
@pytest.mark.parametrize("heard_by", [set(), {0}, {1, 3}, {0, 1, 2, 3}])
def test_a_member_killed_in_any_phase(phase, dead, heard_by):
    """Either all survivors have the sum of all four members, or none has a sum, and the next attempt gives
    that of the survivors. Where a set was committed, only the secret of a member that died before anybody
    heard it can be missing.
    """
    parties = Parties(4)
    played = play(parties.attempt(), kills=[Kill(dead, phase, frozenset(heard_by - {dead}))])
    results = [result for i, result in enumerate(played.results) if i != dead]
    assert played.results[dead] is None and len({type(result) for result in results}) == 1
    if isinstance(results[0], AgreedSum):
        assert all_have(results, parties.sum())
        assert phase in ("unmask", "sums", "challenge", "done"), "a sum without everyone's signature"
    else:
        assert all(result.lost == {dead} and not result.fatal for result in results)
        heard = bool(heard_by - {dead})
        committed = phase == "unmask" or (phase == "confirm" and heard)
        assert {result.settled for result in results} == {committed}
        assert phase not in ("sums", "challenge", "done") and not (phase == "unmask" and heard)
        again = play(parties.attempt(1, frozenset({dead})))
        assert all_have(again.results, parties.sum(frozenset({dead})))


@pytest.mark.parametrize("phase", ["hop 1", "confirm", "unmask", "sums"])
def test_two_members_killed_one_after_the_other(phase):
    parties = Parties(5)
    kills = [Kill(1, phase, frozenset({0})), Kill(3, "recover", frozenset({2}))]
    results = [r for i, r in enumerate(play(parties.attempt(), kills=kills).results) if i not in (1, 3)]
    assert len({type(result) for result in results}) == 1
    assert all_have(results, parties.sum()) or all(result.lost == {1, 3} for result in results), results


def test_too_few_survivors_stop():
    parties = Parties(4)
    results = play(parties.attempt(), kills=[Kill(0, "sums"), Kill(1, "sums")]).results
    for result in results[2:]:
        assert result.fatal and "only 2 of 4 members are left, 3 are needed" in str(result)


def test_an_owner_and_its_backup_lost_together():
    """Their masked sums are gone; the committed set cannot be opened."""
    results = play(Parties(6).attempt(), kills=[Kill(2, "sums"), Kill(3, "sums")]).results
    for result in (results[i] for i in (0, 1, 4, 5)):
        assert isinstance(result, AttemptFailed) and result.fatal
        assert "both stored the same sums" in str(result)
