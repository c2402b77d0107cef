"""Division of the trainable arrays into units, and which clients of a round train which unit. Pure
functions.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from fedspeed.models.folded import module_of

_ORDER_STREAM = 0x5B7  # the random stream of the clients' order


def units_of(names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Return the names of each unit's arrays: all those of one LoRA module, or a single other weight."""
    units: dict[str, list[str]] = {}
    for name in sorted(names):
        units.setdefault(module_of(name), []).append(name)
    return tuple(map(tuple, units.values()))


def holders(
    units: int, clients: Sequence[int], *, least: int, seed: int, round: int, exchange: int = 0
) -> tuple[tuple[int, ...], ...]:
    """Return the clients that train each unit in an exchange: [units] tuples of clients, each in ascending
    order.

    Every unit has `least` clients, or more where there are more clients than that takes; every client has a
    unit, and no two clients' numbers of units differ by more than one. With M clients, each takes every place
    once in M rounds, hence trains every unit, in an order that is drawn anew every M rounds.

    Args:
        clients: M clients of the round, in an order that is the same on all ranks.
        least: clients of a unit, at most M of which count. seed: of the run. round: from 1.
    """
    count = len(clients)
    cycle, turned = divmod(round - 1, count)
    order = np.random.default_rng([seed, _ORDER_STREAM, cycle]).permutation(count)
    places = place_count(units, count, least)
    held: list[list[int]] = [[] for _ in range(units)]
    for place in range(places):
        held[place * units // places].append(clients[order[(place + turned + exchange) % count]])
    return tuple(tuple(sorted(of_unit)) for of_unit in held)


def fewest_holders(units: int, participants: Mapping[int, int], least: int) -> int:
    """Return the smallest number of participants among the clients of any unit in any round.

    In some round, any clients may share a unit, so those that count are the clients of the participants with
    the most clients.

    Args:
        units: 0 where their number is not known. participants: by client, the one that speaks for it.
        least: see `holders`.
    """
    clients = len(participants)
    fewest = min(least, clients)
    if units:
        fewest = max(fewest, clients // units)
    together = 0
    for number, (_, spoken_for) in enumerate(Counter(participants.values()).most_common(), start=1):
        together += spoken_for
        if together >= fewest:
            return number
    return 0


def place_count(units: int, clients: int, least: int) -> int:
    """Return how many pairs of a unit and a client there are."""
    return max(units * min(least, clients), clients)
