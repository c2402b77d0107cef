"""Coalitions that lie, in every size that leaves two honest members: they are found by their own signatures,
no honest member is ever named alone, and whoever ends with a sum has the right one.
"""

from collections import Counter

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedspeed.routing.anonymous.announcement import BODY, Announcement, commit_to_contribution
from fedspeed.routing.anonymous.cells import SERIAL
from fedspeed.routing.anonymous.crypto import DIGEST, KEY, SIGNATURE, digest, public_bytes
from fedspeed.routing.anonymous.lockstep import Kill, play
from fedspeed.routing.anonymous.paths import draw_paths
from fedspeed.routing.anonymous.phases import AttemptFailed
from tests.routing.anonymous.cheats import resigned
from tests.routing.anonymous.coalitions import alone, check, coalitions, liar
from tests.routing.anonymous.parties import Parties

FIELDS = (
    "onion_key",
    "mask_key",
    "beacon_commitment",
    "comparison_commitment",
    "secret_commitment",
    "subject",
    "mark",
)


# Findings 2 and 6: what members announce, and the beacon.


def other_field(name: str):
    """Return the change of one field of an announcement to something else of the same kind."""

    def change(member, receiver, message):
        start = KEY * FIELDS.index(name)
        other = public_bytes(X25519PrivateKey.generate())
        return resigned(member, "announce", message[:start] + other + message[start + KEY : BODY])

    return change


def test_the_fields_of_an_announcement_are_all_attacked():
    assert tuple(Announcement.__dataclass_fields__) == FIELDS


@pytest.mark.parametrize("turn,field", list(enumerate(FIELDS)))
def test_whoever_announces_itself_otherwise_to_one_is_convicted_alone_by_all(turn, field):
    """Other onion keys made the victim's cells seem broken, so that the victim was blamed alone."""
    for n, liars, honest in coalitions(turn):
        victim = honest[-1]
        kind = liar({"announce": other_field(field)}, {victim})
        played = play(Parties(n, kinds=dict.fromkeys(liars, kind)).attempt())
        check(played.results, liars, ended=False)
        assert "hop 0" not in played.phases, "no cell is made for keys that were not announced to all"
        for i in honest:
            assert alone(played.results[i]) == liars, (n, liars, i, played.results[i])


@pytest.mark.parametrize("turn", range(2))
def test_a_contribution_to_the_beacon_cannot_be_split(turn):
    """Each liar commits to one contribution towards some members and to another one towards the rest, and
    reveals to each what it has committed to towards it.
    """
    second = digest(b"second contribution")
    start = KEY * FIELDS.index("beacon_commitment")

    def announce(member, receiver, message):
        other = message[:start] + commit_to_contribution(second) + message[start + KEY : BODY]
        return resigned(member, "announce", other)

    changes = {"announce": announce, "reveal": lambda member, receiver, message: second + message[KEY:]}
    for n, liars, honest in coalitions(turn):
        kinds = dict.fromkeys(liars, liar(changes, {honest[-1]}))
        results = play(Parties(n, kinds=kinds).attempt()).results
        check(results, liars, ended=False)
        assert all(alone(results[i]) == liars for i in honest)


def test_a_member_that_withholds_its_contribution_is_left_out_of_the_retry():
    for n, liars, honest in coalitions():
        if n - len(liars) < n // 2 + 1:
            continue  # too few are left
        parties = Parties(n)
        results = play(parties.attempt(), kills=[Kill(i, "reveal") for i in liars]).results
        for i in honest:
            assert isinstance(results[i], AttemptFailed) and results[i].lost == liars
        again = play(parties.attempt(1, liars)).results
        assert all(np.array_equal(result.values, parties.sum(liars)) for result in again)


@pytest.mark.parametrize("n,f,relays", [(4, 2, 2), (5, 3, 2), (7, 5, 2), (7, 4, 3)])
def test_grinding_the_beacon_gains_no_more_than_the_retries(n, f, relays):
    """A coalition sees the beacon before it reveals its last contribution. It withholds that, at the cost of
    one member, whenever the relays of a chunk that it wants are not all its own. With p for one beacon, the
    chance is at most 1 - (1 - p)^(1 + retries).
    """
    random = np.random.default_rng([n, f, relays])
    trials = 1500
    retries = min(f, 3)
    hits = Counter()
    for _ in range(trials):
        for withheld in range(retries + 1):
            present = n - withheld
            if present < 3:
                break
            plan = draw_paths(random.bytes(32), present, present, min(relays, present - 1), 1)
            hit = all(member < f - withheld for member in plan.paths[0][:-1])  # the liars are 0 .. f - 1
            hits[withheld] += hit
            if hit:
                break
    p = float(np.prod([(f - i) / (n - i) for i in range(relays)]))
    bound = 1 - (1 - p) ** (1 + retries)
    slack = 4 * np.sqrt(bound / trials)
    assert hits[0] / trials == pytest.approx(p, abs=slack)
    assert sum(hits.values()) / trials <= bound + slack


# Finding 4: lists, and sums.


@pytest.mark.parametrize("turn", range(2))
def test_lists_that_differ_convict_their_owners(turn):
    def change(member, receiver, message):
        size = len(member.plan.owned(member.me)) * (member.n * SERIAL + DIGEST)
        text = message[: size - 1] + bytes([message[size - 1] ^ 1])
        return resigned(member, "collect", text) + message[size + SIGNATURE :]

    for n, liars, honest in coalitions(turn):
        victim = honest[0]
        kinds = dict.fromkeys(liars, liar({"collect": change}, {victim}))
        played = play(Parties(n, kinds=kinds).attempt())
        check(played.results, liars, ended=False)
        assert all(alone(played.results[i]) == liars for i in honest)
        assert "unmask" not in played.phases


def zeros(member, receiver, message):
    """Open all chunks as zeros."""
    return bytes(len(message))


def unseen_by_checksums(member, receiver, message):
    """Change two values of each chunk so that a linear checksum of public factors stays as it is."""
    sums = np.frombuffer(message, np.uint32).copy().reshape(-1, member.plan.chunk_length)
    factors = np.random.default_rng(1).integers(0, 2**32, member.plan.chunk_length, np.uint32)
    before = (sums * factors).sum(axis=1, dtype=np.uint32)
    sums[:, 0] += factors[1]
    sums[:, 1] -= factors[0]
    assert np.array_equal((sums * factors).sum(axis=1, dtype=np.uint32), before)
    return sums.tobytes()


@pytest.mark.parametrize("change", [zeros, unseen_by_checksums])
@pytest.mark.parametrize("to_all", [True, False])
def test_owners_that_open_falsely_are_named_and_the_sum_is_right(change, to_all):
    """Each path has an honest member here, as there are as many relays as liars."""
    for turn, sizes in ((0, (3, 4, 7)), (2, (4, 5))):
        for n, liars, honest in coalitions(turn, sizes):
            victim = honest[0]
            kind = liar({"sums": change}, None if to_all else {victim})
            parties = Parties(n, kinds=dict.fromkeys(liars, kind), relays=max(2, len(liars)))
            results = play(parties.attempt()).results
            check(results, liars, ended=True)
            for i in honest:
                assert np.array_equal(results[i].values, parties.sum())
                named = frozenset().union(*results[i].blamed)
                assert liars <= named, (n, liars, results[i].blamed)


@pytest.mark.parametrize("turn", range(2))
def test_owners_that_send_other_masked_sums_than_they_have_listed_are_lost(turn):
    """After the false sums the masked ones are due. Their owners' backups send those in their place, unless
    they lie too.
    """

    def change(member, receiver, message):
        return bytes([message[0] ^ 1]) + message[1:]

    for n, liars, honest in coalitions(turn, (3, 4, 5)):
        kinds = dict.fromkeys(liars, liar({"sums": zeros, "masked": change}))
        parties = Parties(n, kinds=kinds, relays=max(2, len(liars)), threshold=2)
        results = play(parties.attempt()).results
        check(results, liars, ended=len(liars) == 1)
        for i in honest:
            if len(liars) == 1:
                assert np.array_equal(results[i].values, parties.sum()) and results[i].lost == liars
            else:
                assert "both stored the same sums" in str(results[i])
