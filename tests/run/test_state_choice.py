"""From which state a site goes on, given what all offer: decided by signatures, and by nobody's claim."""

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedspeed.errors import FedSpeedError
from fedspeed.routing.anonymous.crypto import public_bytes
from fedspeed.routing.state_certificate import MAX_BYTES, StateCertificate
from fedspeed.routing.state_claim import StateClaim
from fedspeed.session.state_choice import Choice, Kind, Offer, choose
from tests.run.states import SETTINGS, claim, signed

KEYS = [Ed25519PrivateKey.generate() for _ in range(7)]
ROSTER = tuple(map(public_bytes, KEYS[:4]))
NAMES = ("site0", "site1", "site2", "site3")
NONE = Offer(Kind.NONE)
FRESH = Offer(Kind.FRESH)
FORGED = Offer(Kind.CERTIFIED, problem="the certificate of its round 4 is ignored: it lacks a signature")


def certified(round, keys=(0, 1, 2, 3), **more):
    of = claim(round, **more)
    return Offer(Kind.CERTIFIED, of, signed([KEYS[i] for i in keys], of))


def unsigned(round, value=0.5):
    return Offer(Kind.UNSIGNED, claim(round, value))


@pytest.mark.parametrize(
    ("offers", "round", "holders"),
    [
        ((NONE,) * 4, None, ()),
        # Whoever claims to have finished without signatures decides nothing.
        ((NONE, NONE, FORGED, NONE), None, ()),
        ((FRESH, FRESH, FORGED, FRESH), None, ()),
        ((certified(2), FORGED, certified(2), certified(2)), 2, (0, 2, 3)),
        # Nobody is rolled back.
        ((certified(3), certified(0), NONE, certified(2)), 3, (0,)),
        ((certified(0), certified(0), certified(3), NONE), 3, (2,)),
        # One site that alone has survived a loss of power hands its state to the others.
        ((NONE, NONE, NONE, certified(3)), 3, (3,)),
        # Others went on without this site; a majority of the roster has signed.
        ((certified(1), certified(4, (1, 2, 3)), NONE, certified(4, (1, 2, 3))), 4, (1, 3)),
        # Of the signers only two are in the roster; a third one stands by the state now.
        ((NONE, certified(4, (1, 3, 5, 6)), certified(4, (1, 3, 5, 6)), NONE), 4, (1, 2)),
        # This site's journal is of an earlier version.
        ((unsigned(2), certified(3), NONE, NONE), 3, (1,)),
    ],
)
def test_what_a_site_goes_on_from(offers, round, holders):
    choice = choose(offers, 0, ROSTER, NAMES)
    assert (choice.claim and choice.claim.round, choice.holders, choice.is_unsigned) == (
        round,
        holders,
        False,
    )


def test_why_an_offer_is_not_accepted_is_said():
    strangers = certified(9, (4, 5, 6))
    choice = choose((NONE, strangers, FORGED, NONE), 0, ROSTER, NAMES)
    assert choice == Choice() and "site1: its state of round 9" in choice.remarks[1]
    assert "no majority of the roster" in choice.remarks[1] and choice.remarks[0].startswith("site2: ")
    two_of_four = certified(9, (1, 5, 6))  # site1 has signed it, site3 stands by it
    assert choose((NONE, NONE, NONE, two_of_four), 0, ROSTER, NAMES).claim is None, "half is no majority"


def test_signatures_of_another_run_of_the_same_settings_do_not_count():
    """A member keeps certificates of earlier runs; this site's journal is of the current one."""
    other = certified(6, run=b"another run".ljust(32))
    choice = choose((certified(2), other, certified(2), other), 0, ROSTER, NAMES)
    assert choice.claim == claim(2) and "of another run" in choice.remarks[0]
    with pytest.raises(FedSpeedError, match="site0 starts anew with --fresh, but site1, site3 offer"):
        choose((FRESH, other, NONE, other), 0, ROSTER, NAMES)


def test_two_signed_states_of_one_round_are_refused_with_both():
    offers = (certified(3), certified(3, value=0.25), NONE, certified(3))
    with pytest.raises(FedSpeedError, match=r"round 3, .*: site0, site3: round 3 .*; site1: round 3"):
        choose(offers, 2, ROSTER, NAMES)


def test_journals_of_earlier_versions_are_signed_if_all_are_the_same():
    choice = choose([unsigned(2)] * 4, 0, ROSTER, NAMES)
    assert choice == Choice(claim(2), (0, 1, 2, 3), is_unsigned=True)
    for other in (unsigned(2, 0.25), unsigned(1), NONE):
        with pytest.raises(FedSpeedError, match=r"only if all have the same one; .* --fresh on all sites"):
            choose([unsigned(2), unsigned(2), other, unsigned(2)], 0, ROSTER, NAMES)
    with pytest.raises(FedSpeedError, match="has round 5 without the signatures"):
        choose([unsigned(5), certified(3), NONE, NONE], 0, ROSTER, NAMES)


def test_a_certificate_is_the_signatures_of_all_its_members():
    good = signed(KEYS[:3], claim(2))
    assert StateCertificate.unpack(good.pack()) == good and good.problem(SETTINGS) == ""
    assert len(good.pack()) < MAX_BYTES
    swapped = replace(good, signatures=(*good.signatures[1:], good.signatures[0]))
    fewer = replace(good, members=good.members[:2], signatures=good.signatures[:2])
    twice = signed([KEYS[0], KEYS[0]], claim(2))
    for bad in (
        swapped,
        fewer,
        twice,
        replace(good, claim=claim(3)),
        replace(good, claim=replace(good.claim, best_loss=-40.0)),
        replace(good, settings=b"t" * 32),
    ):
        assert bad.problem(SETTINGS if bad.settings == SETTINGS else SETTINGS)


@pytest.mark.parametrize("size", [0, 1, 100, len(signed(KEYS[:2], claim(1)).pack()) - 1])
def test_what_is_no_certificate_is_a_value_error(size):
    packed = signed(KEYS[:2], claim(1)).pack()
    for data in (packed[:size], bytes(size), packed + b"\0"):
        with pytest.raises(ValueError):
            StateCertificate.unpack(data)


@pytest.mark.parametrize(
    "change",
    [
        {"round": -1},
        {"best_round": 3},
        {"best_loss": float("nan")},
        {"stale": -1},
        {"alignment": float("inf")},
    ],
)
def test_impossible_numbers_of_a_claim_are_a_value_error(change):
    of = claim(2, best_round=1, best_loss=0.25, stale=1, alignment=-0.5)
    assert StateClaim.unpack(of.pack()) == of
    with pytest.raises(ValueError, match="impossible numbers"):
        StateClaim.unpack(replace(of, **change).pack())
