"""Bisection over integers: where a condition begins to be true, or ends. Pure."""

from collections.abc import Callable

Condition = Callable[[int], bool]


def smallest(low: int, high: int, condition: Condition) -> int:
    """Find the smallest number from `low` to `high` that meets a condition.

    If a number meets it, all larger ones must too, and `high` must meet it.
    """
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if condition(middle) else (middle + 1, high)
    return high


def smallest_up_to(high: int, condition: Condition) -> int | None:
    """Find the smallest number from 1 to `high` that meets a condition, or None if none does.

    If a number meets it, all larger ones must too.
    """
    return smallest(1, high, condition) if condition(high) else None


def largest_up_to(high: int, condition: Condition) -> int | None:
    """Find the largest number from 1 to `high` that meets a condition, or None if none does.

    If a number meets it, all smaller ones must too.
    """
    if high < 1 or not condition(1):
        return None
    low = 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if condition(middle) else (low, middle - 1)
    return low
