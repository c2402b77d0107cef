"""Statements to all members: who is named for different ones, and what a new start is bound to."""

import random

import pytest

from fedspeed.errors import FedSpeedError, LostPeerError
from fedspeed.routing.agreed_broadcast import Verdict, broadcast, verdict
from fedspeed.routing.anonymous.crypto import SIGNATURE, digest
from fedspeed.routing.session_hello import contradictions, open_session
from tests.routing.members import SOON_S, Members

CONTEXT = b"a context that is new"
A = b"a" * 32
B = b"b" * 32


def pairs(*groups):
    return frozenset(map(frozenset, groups))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(A, A, B)] * 3, Verdict()),
        ([(A, A, B), (A, A, A), (A, A, B)], Verdict(convicted=frozenset({2}))),
        # Two signatures convict a member, whoever else is accused of something.
        ([(A, None, B), (A, A, A), (A, A, B)], Verdict(frozenset({2}), pairs({0, 1}))),
        ([(A, A, B), (A, A, None), (A, A, B)], Verdict(pairs=pairs({1, 2}))),
        ([(A, A, B), None, (A, A, B)], Verdict(pairs=pairs({0, 1}))),
        ([(A, A, B), (A, None, B), (A, A, B)], Verdict(pairs=pairs({0, 1}))),
    ],
)
def test_who_is_named(rows, expected):
    assert verdict(rows, me=0) == expected


def test_members_get_what_all_others_have_signed():
    members = Members(4)
    results = members.play(lambda group: broadcast(group, CONTEXT, "a label", bytes([group.me] * 5)))
    assert results == [[bytes([i] * 5) for i in range(4)]] * 4


def signed_anew(members, body):
    """Return member 0's statement with another body, signed by it."""
    statement = digest(b"agreed broadcast", CONTEXT, b"a label", digest(body))
    return body + members.keys[0].sign(statement)


@pytest.mark.parametrize("size", [3, 4, 5])
def test_two_signed_statements_convict_their_member_alone_at_all_others(size):
    members = Members(size)

    def alter(number, receiver, part):
        return signed_anew(members, b"other") if number == 0 and receiver == size - 1 else part

    results = members.play(lambda group: broadcast(group, CONTEXT, "a label", b"equal"), alter, liar=0)
    for error in results[1:]:
        assert type(error) is FedSpeedError and "a label: site0 signed different statements" in str(error)
        assert not any(f"site{i}" in str(error) for i in range(1, size))


@pytest.mark.parametrize("changed", ["statement", "table", "entry", "replay"])
def test_a_member_that_sends_one_other_something_unsigned_is_named_with_it(changed):
    """Nobody else can tell which of the two lies. An honest member is never named alone."""
    members = Members(4)

    def alter(number, receiver, part):
        data = bytearray(part)
        if changed == "statement" and number == 0 and receiver == 2:
            data[0] ^= 1
        if changed == "replay" and number == 0 and receiver == 2:  # its signature of an earlier context
            data[-SIGNATURE:] = members.keys[0].sign(digest(b"agreed broadcast", b"old", b"a label", A))
        if changed == "table" and number == 1 and receiver == 2:
            data[-1] ^= 1
        if changed == "entry" and number == 1:  # it says that member 3 had signed nothing
            data[3 * 96] ^= 1
            table = bytes(data[:-SIGNATURE])
            data[-SIGNATURE:] = members.keys[0].sign(
                digest(b"table of an agreed broadcast", CONTEXT, b"a label", table)
            )
        return bytes(data)

    results = members.play(lambda group: broadcast(group, CONTEXT, "a label", b"equal"), alter, liar=0)
    named = {"entry": "site0 and site3"}.get(changed, "site0 and site2")
    errors = [error for error in results[1:] if isinstance(error, FedSpeedError)]
    assert errors and all(str(error).split(": ")[2].startswith(named) for error in errors), errors
    if changed != "table":
        assert len(errors) == 3, "all honest members see the same contradiction"


def random_lie(members, rng):
    """Return what a member (the last one) sends that changes one of its messages to some of the others."""
    size = len(members.keys)
    liar = size - 1
    in_swap = rng.randrange(2)
    victims = rng.sample(range(size), rng.randint(1, size))
    kind = rng.choice(["flipped", "signed", "noise"])
    at = rng.randrange(5 + SIGNATURE)

    def alter(number, receiver, part):
        if number != in_swap or receiver not in victims:
            return part
        if kind == "noise":
            return rng.randbytes(len(part))
        data = bytearray(part)
        data[at] ^= 1
        if kind == "signed":
            body = bytes(data[:-SIGNATURE])
            signed = (
                (b"table of an agreed broadcast", body) if number else (b"agreed broadcast", digest(body))
            )
            data[-SIGNATURE:] = members.keys[liar].sign(digest(signed[0], CONTEXT, b"a label", signed[1]))
        return bytes(data)

    return alter


@pytest.mark.parametrize("size", [3, 4])
def test_no_lie_makes_honest_members_differ_or_be_named_alone(size):
    for seed in range(40):
        members = Members(size)
        alter = random_lie(members, random.Random(seed))
        results = members.play(
            lambda group: broadcast(group, CONTEXT, "a label", b"equal"), alter, liar=size - 1
        )[:-1]
        bodies = [tuple(result) for result in results if not isinstance(result, Exception)]
        assert len(set(bodies)) <= 1, seed
        for error in (result for result in results if isinstance(result, Exception)):
            assert type(error) is FedSpeedError, seed
            if not str(error).startswith(f"a label: site{size - 1} signed different statements"):
                named = str(error).split(": ", 2)[-1].split(";")[0].split(", ")
                assert all(f"site{size - 1}" in pair and " and " in pair for pair in named), seed


def test_a_member_that_sends_nothing_is_missing_by_name():
    members = Members(3, SOON_S)

    def alter(number, receiver, part):
        return b"" if number == 1 and receiver == 1 else part

    results = members.play(lambda group: broadcast(group, CONTEXT, "a label", b"equal"), alter, liar=2)
    assert type(results[1]) is LostPeerError
    assert "site2 did not send its table of a label" in str(results[1])


def start(group, settings=A):
    return open_session(group, b"roster", settings)


def test_a_session_is_new_and_the_same_for_all():
    members = Members(3)
    first = members.play(start)
    second = members.play(start)
    assert len(set(first)) == len(set(second)) == 1 and len(first[0]) == 32
    assert first[0] != second[0], "no signature of an earlier start is valid"


def test_a_nonce_of_which_members_were_told_differently_names_its_member_with_each():
    members = Members(4)

    def alter(number, receiver, part):
        return bytes(32) if number == 0 and receiver == 3 else part

    results = members.play(start, alter, liar=1)
    for i in (0, 2, 3):
        error = str(results[i])
        named = error.split(": ")[2].split(";")[0].split(", ")
        assert type(results[i]) is FedSpeedError and all("site1" in pair for pair in named), error


def test_contradictions_hold_a_liar():
    lists = [A + B, A + B]
    assert contradictions(lists, 0) == frozenset()
    assert contradictions([A + B + A, A + B + A, A + B + B], 0) == pairs({2, 0})
    assert contradictions([A + B + A, A + B + A, A + A + A], 0) == pairs({2, 1})


def test_settings_that_are_signed_differently_end_the_start():
    """A site shows the others their own settings, and signs a digest of its own."""
    members = Members(3)
    results = members.play(lambda group: start(group, B if group.me == 2 else A))
    for error in results[:2]:
        assert type(error) is FedSpeedError and str(error).startswith("site2 signed a digest of other")
