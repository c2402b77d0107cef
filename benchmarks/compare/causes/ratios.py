"""Ratios of pairs of measurements, and how far losses differ. Pure."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """How many times as much one of a pair takes: the median of the pairs, the least and the most."""

    median: float
    least: float
    most: float


def ratio(off: Sequence[float], on: Sequence[float]) -> Ratio:
    """Return the ratio of neighbouring measurements, which a change of the machine's own speed affects alike.

    Args:
        off, on: with a thing switched off, and with everything on; equally many, at least one.
    """
    pairs = [a / b for a, b in zip(off, on, strict=True)]
    return Ratio(statistics.median(pairs), min(pairs), max(pairs))


def difference(off: Sequence[float], on: Sequence[float]) -> float:
    """Return the largest relative difference of the losses of the same steps; infinite if they are not of the
    same number of steps.
    """
    if len(off) != len(on):
        return math.inf
    return max((abs(a - b) / max(abs(a), abs(b), 1e-30) for a, b in zip(off, on)), default=0.0)


def equal_to(value: float) -> str:
    """Return a difference as text: `the same bits`, or the power of ten that it stays below."""
    if value == 0:
        return "the same bits"
    return f"to 1e{math.ceil(math.log10(value))}" if value < math.inf else "not comparable"
