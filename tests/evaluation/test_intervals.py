"""Intervals of scores, against published values and against simulation."""

import numpy as np
import pytest

from fedspeed.data.eval_task import Tally
from fedspeed.evaluation.intervals import interval_95


@pytest.mark.parametrize(
    ("right", "items", "low", "high"),
    # R. G. Newcombe, Statistics in Medicine 17 (1998), table I: Wilson without continuity correction.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_shares_have_wilsons_interval(right, items, low, high):
    tally = Tally.of([1.0] * right + [0.0] * (items - right))
    assert interval_95(tally) == pytest.approx((low, high), abs=5e-5)


def test_means_and_ratios_have_the_normal_interval():
    scores = [0.5, 0.25, 1.0, 0.0, 0.75]
    spread = np.std(scores, ddof=1) / np.sqrt(len(scores))
    mean = np.mean(scores)
    assert interval_95(Tally.of(scores)) == pytest.approx((mean - 1.96 * spread, mean + 1.96 * spread), 1e-4)
    assert interval_95(Tally()) is None and interval_95(Tally.of([0.5])) is None


def test_the_interval_of_a_loss_covers_the_true_loss():
    """Items of many lengths: their losses are correlated with their tokens, as those of real rows are."""
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        tokens = random.integers(1, 60, size=80)
        losses = tokens * (1.0 + random.gamma(2.0, 0.5, size=80) - 0.01 * tokens)
        tally = sum((Tally.of_sum(a, b) for a, b in zip(losses, tokens)), Tally())
        low, high = interval_95(tally)
        true = 2.0 - 0.01 * np.mean(np.arange(1, 60) ** 2) / np.mean(np.arange(1, 60))
        covered += low <= true <= high
    assert 0.91 < covered / 300 < 0.985
