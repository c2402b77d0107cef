"""The number from which, or up to which, something holds. Pure."""

from collections.abc import Callable


def least(low: int, high: int, does: Callable[[int], bool]) -> int:
    """Find the smallest number of `low` to `high` for which `does` holds. It must hold from some number on,
    and for `high`.
    """
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if does(middle) else (middle + 1, high)
    return high


def smallest(does, most: int) -> int | None:
    """The smallest number of 1 to `most` for which `does` holds, None if it holds for none. It must hold from
    some number on.
    """
    return least(1, most, does) if does(most) else None


def largest(does, below: int) -> int | None:
    """The largest number of 1 to `below` for which `does` holds. It must hold up to some number."""
    if below < 1 or not does(1):
        return None
    low = 1
    high = below
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if does(middle) else (low, middle - 1)
    return low
