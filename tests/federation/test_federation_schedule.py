"""Sampling and learning rates: functions of the round's and the step's number alone."""

import math
from collections import Counter

import pytest

from fedspeed.data.config import TrainConfig
from fedspeed.federation.schedule import lr_at, sample_clients, turn_order


@pytest.mark.parametrize("asked", [1, 3, 6, 7])
def test_a_sample_has_its_size_and_nobody_twice(asked):
    for round in range(1, 50):
        drawn = sample_clients(3, round, 7, asked)
        assert len(drawn) == asked == len(set(drawn)) and list(drawn) == sorted(drawn)
        assert set(drawn) <= set(range(7)) and all(type(c) is int for c in drawn)


def test_everyone_is_sampled_by_default():
    assert sample_clients(3, 1, 4, 0) == sample_clients(9, 5, 4, 4) == (0, 1, 2, 3)


def test_samples_depend_on_seed_and_round_only():
    rounds = [sample_clients(3, r, 20, 5) for r in range(1, 30)]
    assert rounds == [sample_clients(3, r, 20, 5) for r in range(1, 30)]
    assert len(set(rounds)) > 25 and rounds != [sample_clients(4, r, 20, 5) for r in range(1, 30)]


def test_every_client_is_asked_equally_often():
    counts = Counter(c for r in range(1, 2001) for c in sample_clients(1, r, 5, 2))
    assert all(abs(n - 800) < 5 * math.sqrt(2000 * 0.4 * 0.6) for n in counts.values()), counts


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_learning_rate_is_continuous_over_rounds(schedule, warmup):
    """No jump anywhere, rounds of 10 steps included: neighbours differ by no more than the steepest slope
    allows.
    """
    train = TrainConfig(lr=1.0, schedule=schedule, warmup_steps=warmup)
    total = 50
    rates = [lr_at(train, s, total) for s in range(total)]
    slope = max(
        1 / warmup if warmup else 0,
        {"constant": 0, "linear": 1, "cosine": math.pi / 2}[schedule] / (total - warmup),
    )
    assert all(abs(b - a) <= slope + 1e-12 for a, b in zip(rates, rates[1:]))
    assert max(rates) == 1.0 and rates.index(1.0) == max(0, warmup - 1)
    assert all(0 < r <= 1 for r in rates)


def test_learning_rates_by_hand():
    linear = TrainConfig(lr=2.0, schedule="linear", warmup_steps=2)
    assert [lr_at(linear, s, 6) for s in range(6)] == [1.0, 2.0, 2.0, 1.5, 1.0, 0.5]
    cosine = TrainConfig(lr=2.0, schedule="cosine")
    assert [lr_at(cosine, s, 4) for s in (0, 2)] == pytest.approx([2.0, 1.0])
    assert lr_at(cosine, 1, 4) == pytest.approx(1 + math.sqrt(0.5))
    assert lr_at(TrainConfig(lr=2.0, warmup_steps=8), 3, 4) == 1.0, "a warm-up longer than the run"
    with pytest.raises(AssertionError, match="local step -1 is none of the run's 6"):
        lr_at(linear, -1, 6)
    assert lr_at(linear, 6, 6) == lr_at(linear, 60, 6) == 0.5, "an audit takes more steps than the run"


def test_turns_come_in_the_order_in_which_ranks_take_them():
    """Clients 0 to 2 on participant 0, 3 and 4 on participant 2: the first of each, the second of each, the
    third.
    """
    speakers = (0, 0, 0, 2, 2)
    assert turn_order(range(5), speakers) == (0, 3, 1, 4, 2)
    assert turn_order((1, 2, 4), speakers) == (1, 4, 2)
    assert turn_order((), speakers) == ()
