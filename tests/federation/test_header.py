"""Sums over participants that lie: what they can be is public, and what cannot be is refused."""

import numpy as np
import pytest

from fedspeed.errors import FedSpeedError
from fedspeed.federation.header import (
    MAX_SITE_CLIENTS,
    Header,
    Signals,
    SumLimits,
    at_least,
    bounds_problem,
    ledger_problem,
    refuse,
    signals_problem,
    steps_problem,
    weight_problem,
)
from fedspeed.federation.ledger import Ledger
from fedspeed.federation.link import Sum

LIMITS = SumLimits(max_weight=1000.0, clients=3, ranks=3, steps=4)


def share(**slots):
    """Return the ledger of a rank with one client, or a sum; `slots` replace its values."""
    ledger = Ledger(3, 3, sums_only=True)
    of_client = {
        "train_loss": 30.0,
        "tokens": 20.0,
        "val_loss": 12.0,
        "val_tokens": 8.0,
        "exact": 1.0,
        "rows": 2.0,
        "asked": 1.0,
        "received": 1.0,
    }
    of_rank = {"ranks": 1.0, "wall_s": 2.0, "idle_s": 0.5, "bytes_sent": 100.0, "stop": 0.0, "renew": 0.0}
    for name in of_client:
        ledger.add_client(0, **{name: slots.get(name, of_client[name])})
    ledger.set_rank(0, **{name: slots.get(name, value) for name, value in of_rank.items()})
    ledger.set_rank(0, **{name: value for name, value in slots.items() if name not in of_client})
    return ledger


def summed(*shares):
    return Ledger(3, 3, sum(one.vector for one in shares), sums_only=True)


def problem(liar, limits=LIMITS):
    """Return what an honest participant of three says of the sum with a liar."""
    return ledger_problem(summed(share(), share(), liar), share(), 3, limits)


def test_honest_sums_are_possible():
    assert problem(share()) == ""
    assert problem(share(received=0.0, train_loss=np.nan)) == "", "its client has diverged"
    assert problem(share(val_loss=np.nan)) == "", "a loss of NaN beats no round"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("received", 1000.0, "received sums to 1002 of 3 (asked)"),
        ("received", -1000.0, "received sums to -998, where this one alone has 1"),
        ("received", np.nan, "received sums to nan"),
        ("asked", 1000.0, "asked sums to 1002, which is above 3"),
        ("val_loss", -40.0, "val_loss sums to -16, where this one alone has 12"),
        ("val_loss", -13.0, "val_loss sums to 11, where this one alone has 12"),
        ("val_loss", -np.inf, "val_loss sums to -inf"),
        ("val_tokens", -15.0, "val_tokens sums to 1, where"),
        ("train_loss", -1e9, "train_loss sums to"),
        ("tokens", 1e20, "tokens sums to 1e+20, which is above"),
        ("exact", 5.0, "exact sums to 7 of 6 (rows)"),
        ("ranks", 9.0, "ranks sums to 11, which is above 3"),
        ("ranks", -5.0, "ranks sums to -3, where"),
        ("renew", 1e9, "renew sums to 1e+09 of 3 (ranks)"),
        ("stop", -1.0, "stop sums to -1, where"),
        ("wall_s", -9.0, "wall_s sums to -5, where"),
        ("bytes_sent", np.nan, "bytes_sent sums to nan"),
    ],
)
def test_a_sum_that_no_participants_have_together_is_refused(name, value, text):
    assert text in problem(share(**{name: value}))


def test_a_site_does_not_know_how_many_clients_another_one_has():
    limits = SumLimits(max_weight=1000.0, clients=MAX_SITE_CLIENTS, ranks=9, steps=4, sites=True)
    assert problem(share(asked=500.0, received=500.0, ranks=9.0), limits) == ""
    assert "asked sums to 30003" in problem(share(asked=3 * MAX_SITE_CLIENTS + 1.0), limits)


def test_weights_are_neither_below_ones_own_nor_above_the_public_bound():
    assert weight_problem(120.0, 100.0, 3, 1000.0) == "" == weight_problem(3000.0, 1000.0, 3, 1000.0)
    for weight in (99.0, -5.0, 3001.0, 1e12, np.nan, np.inf):
        text = weight_problem(weight, 100.0, 3, 1000.0)
        assert f"sum to {weight:g}, which is not between this one's own 100 and 3000" in text
        assert "routing.max_weight=1000" in text


def test_weighted_steps_fit_to_the_weights():
    assert steps_problem(200.0, 100.0, own=50.0, steps=4) == ""
    assert steps_problem(0.0, 0.0, own=0.0, steps=4) == "", "no client's update was usable"
    for steps in (99.0, 401.0, np.nan, -1.0):
        assert "weights of 100 together have taken" in steps_problem(steps, 100.0, own=50.0, steps=4)
    assert steps_problem(200.0, 100.0, own=250.0, steps=4)


def test_one_rank_cannot_speak_for_more_than_all():
    """Whoever sends 1e9 would otherwise restart all by itself."""
    own = Signals(1.0, 0.0, 0.0)
    total = Signals(3.0, 0.0, 2.0)
    assert signals_problem(total, own, 3) == "" and not total.wants_renewal and not total.wants_stop
    assert Signals(3.0, 0.0, 3.0).wants_renewal and Signals(3.0, 1.0, 0.0).wants_stop
    for wrong in (
        Signals(3.0, 0.0, 1e9),
        Signals(3.0, -1.0, 0.0),
        Signals(3.0, 4.0, 0.0),
        Signals(1e9, 0.0, 1e9),
        Signals(-2.0, 0.0, 0.0),
        Signals(3.0, np.nan, 0.0),
    ):
        assert "have a newer roster" in signals_problem(wrong, own, 3)


def test_norm_bounds_are_not_below_ones_own():
    own = np.array([1.0, 2.0])
    assert bounds_problem(np.array([1.0, 5.0]), own) == "" == bounds_problem(np.zeros(0), np.zeros(0))
    for wrong in (0.5, -1.0, np.nan, np.inf):
        text = bounds_problem(np.array([3.0, wrong]), own)
        assert f"sum to {wrong:g} in one of 2 blocks" in text and "lower train.lr" in text


def update(weight, participants=3, clipped=0):
    return Sum(
        vector=np.zeros(5),
        weight=weight,
        idle_s=0.0,
        exchange_s=0.0,
        participants=participants,
        clipped=clipped,
        skipped=False,
        bytes_sent=0,
    )


def test_the_weights_of_an_update_are_those_of_its_header():
    """Otherwise somebody claims 1e12 in one of them and nothing in the other, and the mean is wrong."""
    header = Header(bounds=np.zeros(1), weight=300.0, participants=3, limits=LIMITS)
    header.check_update(update(300.0), own_weight=100.0, place="round 3")
    header.check_update(update(200.0, participants=2), own_weight=100.0, place="round 3")
    for total, text in (
        (update(200.0), "the weights sum to 200, and to 300 in the header before it"),
        (update(1e12), "sum to 1e.12, which is not between this one's own 100 and 3000"),
        (update(99.0, participants=2), "sum to 99, which is not between this one's own 100 and 2000"),
        (update(300.0, clipped=16), "16 values were clipped of 3 x 5"),
    ):
        with pytest.raises(FedSpeedError, match=f"the update of round 3: some participant sends .*{text}"):
            header.check_update(total, own_weight=100.0, place="round 3")


def test_mode_plain_trusts_all():
    Header().check_update(update(-5.0), own_weight=100.0, place="round 1")


def test_the_message_names_nobody_and_a_remedy():
    refuse("", "round 3")
    with pytest.raises(FedSpeedError) as caught:
        refuse("received sums to 1002 of 3 (asked)", "round 3")
    assert str(caught.value) == (
        "round 3: some participant sends impossible numbers, and a masked sum does not show which: received "
        "sums to 1002 of 3 (asked); compare the versions of FedSpeed and the settings of all participants. "
        "The same command goes on from the journal"
    )


def test_exact_sums_may_differ_by_their_rounding():
    assert at_least(1e6, 1e6 + 1e-5) and not at_least(1e6, 1e6 + 1.0) and not at_least(np.inf, 0.0)
