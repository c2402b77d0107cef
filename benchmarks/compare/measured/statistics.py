"""Ratios with intervals over seeds, losses at equal tokens and at equal time, time to a target. Pure."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy.stats import t

from benchmarks.compare.measured.records import Point, Run

ABOVE = 1.05  # a target above a reference's loss: rounding does not decide who reaches it


class Interval(NamedTuple):
    """A mean with its 95 % interval; of a single value, the bounds are None."""

    mean: float
    low: float | None
    high: float | None


def ratio(others: Mapping[int, float], reference: Mapping[int, float]) -> Interval | None:
    """Return the geometric mean of the ratios of the seeds that both have, other over reference, with
    Student's 95 % interval of the logarithms; None where no seed is common or a value is not above 0.
    """
    common = sorted(others.keys() & reference.keys())
    pairs = [(others[seed], reference[seed]) for seed in common]
    if not pairs or any(min(pair) <= 0 for pair in pairs):
        return None
    logs = [math.log(other / own) for other, own in pairs]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return Interval(math.exp(mean), None, None)
    half = t.ppf(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Interval(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def final_loss(run: Run) -> float | None:
    """Return the held-out loss of what the run exports, after all its rounds."""
    if run.exported_loss is not None:
        return run.exported_loss
    return next((point.loss for point in reversed(run.curve) if point.loss is not None), None)


def loss_by(curve: Sequence[Point], seconds: float) -> float | None:
    """Return the last loss that was known after so many seconds of rounds; None before the first."""
    known = [point.loss for point in curve if point.loss is not None and point.seconds <= seconds]
    return known[-1] if known else None


def first_at(curve: Sequence[Point], target: float) -> Point | None:
    """Return the first point with at most the target loss; None: there is none."""
    return next((point for point in curve if point.loss is not None and point.loss <= target), None)


def target_of(run: Run) -> float | None:
    """Return ABOVE times the loss of a run after at least half of its rounds."""
    half = run.curve[-1].round / 2 if run.curve else 0
    known = (p.loss for p in run.curve if p.loss is not None and p.round >= max(half, 1))
    loss = next(known, None)
    return None if loss is None else ABOVE * loss


def differences(run: Run, reference: Run) -> list[float]:
    """Return the differences of two runs' losses after equal tokens, by round from the first trained."""
    own = {(point.round, point.tokens): point.loss for point in run.curve if point.loss is not None}
    others = {(p.round, p.tokens): p.loss for p in reference.curve if p.loss is not None}
    common = sorted(key for key in own.keys() & others.keys() if key[0])
    return [abs(own[key] - others[key]) for key in common]
