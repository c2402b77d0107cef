"""95 % intervals of mean scores. Pure."""

import math

from fedspeed.data.eval_task import Tally

Z_95 = 1.959963984540054  # the 0.975 quantile of the normal distribution
_NEAR = 1e-9


def interval_95(tally: Tally) -> tuple[float, float] | None:
    """Return the 95 % interval of a tally's mean score; None where too few items are known.

    Scores that are all 0 or 1 have Wilson's interval (E. B. Wilson, 1927, JASA 22, p. 209-212), which also
    holds for few items and near 0 and 1. Other means, and ratios such as a loss per token, have the normal
    interval of a ratio of sums over independent items (W. G. Cochran, Sampling Techniques, 1977, 6.19).
    """
    if _is_binary(tally):
        return wilson_95(tally.total, tally.items)
    if tally.items < 2 or not tally.weight:
        return None
    mean = tally.mean
    residuals = tally.squares - 2 * mean * tally.cross + mean**2 * tally.weight_squares
    variance = max(0.0, residuals) / (tally.items - 1)
    half = Z_95 * math.sqrt(tally.items * variance) / tally.weight
    return mean - half, mean + half


def wilson_95(successes: float, items: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of items, which has at least one item."""
    share = successes / items
    square = Z_95**2
    centre = (share + square / (2 * items)) / (1 + square / items)
    spread = math.sqrt(share * (1 - share) / items + square / (4 * items**2))
    half = Z_95 / (1 + square / items) * spread
    return max(0.0, centre - half), min(1.0, centre + half)


def _is_binary(tally: Tally) -> bool:
    """Return whether all scores have weight 1 and are 0 or 1: only then is the sum of their squares the sum
    itself, if no score is outside of [0, 1].
    """
    has_weights = abs(tally.weight_squares - tally.items) > _NEAR or abs(tally.weight - tally.items) > _NEAR
    return tally.items > 0 and not has_weights and abs(tally.squares - tally.total) <= _NEAR * tally.items
