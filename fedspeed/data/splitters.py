"""Which client owns which row. Pure functions: sizes or categories and a generator in, one index array a
client out.

Every row lands at exactly one client; a client without rows is an error, never an empty participant.
"""

import heapq
from collections.abc import Hashable, Sequence

import numpy as np

from fedspeed.errors import DataError
from fedspeed.units import shortened_list

_LDA_TRIES = 1000


def iid(n: int, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """A shuffle cut evenly; sizes differ by at most one."""
    return _complete(np.array_split(rng.permutation(n), clients), n)


def meta(categories: Sequence[str], clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """One category a client.

    With more categories than clients, the surplus is merged round-robin; with fewer, the categories with the
    most rows a client are shared evenly by several clients, so that no client mixes two. Which client gets
    which category is shuffled.
    """
    groups = [rng.permutation(group) for group in _groups(categories)]
    groups = _divided(groups, clients) if len(groups) < clients else groups
    order = rng.permutation(len(groups))
    return _complete(
        [np.concatenate([groups[g] for g in order[client::clients]]) for client in range(clients)],
        len(categories),
    )


def lda(categories: Sequence[str], clients: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Each category is shared out by its own draw of Dirichlet(alpha) over the clients (Hsu et al. 2019,
    arXiv 1909.06335).

    Redrawn as a whole until every client has a row.

    Raises:
        DataError: no such draw in 1000 tries, or fewer rows than clients.
    """
    if len(categories) < clients:  # no draw can help
        raise _too_few(len(categories), clients, range(len(categories), clients))
    groups = [rng.permutation(group) for group in _groups(categories)]
    for _ in range(_LDA_TRIES):
        cuts = [_cuts(len(group), rng.dirichlet(np.full(clients, alpha))) for group in groups]
        parts = [np.split(group, cut) for group, cut in zip(groups, cuts)]
        split = [np.concatenate(rows) for rows in zip(*parts)]
        if all(len(rows) for rows in split):
            return _complete(split, len(categories))
    raise DataError(
        f"data.split=lda with data.alpha={alpha:g} left one of {clients} clients without rows in each of "
        f"{_LDA_TRIES} draws "
        f"({len(categories)} rows, {len(groups)} categories); raise data.alpha or lower data.clients"
    )


def hold_out(order: np.ndarray, texts: Sequence[Hashable], count: int) -> list[int]:
    """Which rows of a client are held out: the first `count` of `order`, but equal rows all go to one side.

    Equal rows stand where the first of them stands, and are passed over where they would be more than `count`
    together. If no rows are few enough, the fewest equal ones are held out, unless they are all there are.

    Args:
        order: [rows] the row numbers, shuffled. texts: [rows] what must be equal for two rows to be equal.
    """
    groups: dict[Hashable, list[int]] = {}
    for row in order.tolist():
        groups.setdefault(texts[row], []).append(row)
    held_out: list[int] = []
    for group in groups.values():
        if len(held_out) + len(group) <= count:
            held_out += group
    if count and not held_out and len(groups) > 1:
        return min(groups.values(), key=len)
    return held_out


def _groups(categories: Sequence[str]) -> list[np.ndarray]:
    """Row indices by category, categories in sorted order."""
    names = np.asarray(categories, dtype=str)
    return [np.flatnonzero(names == name) for name in np.unique(names)]


def _cuts(size: int, shares: np.ndarray) -> np.ndarray:
    """Where to cut `size` rows so that client i gets its share, rounded; the last client gets what is
    left.
    """
    return np.minimum(np.rint(np.cumsum(shares)[:-1] * size), size).astype(int)


def _divided(groups: list[np.ndarray], clients: int) -> list[np.ndarray]:
    """The groups cut evenly into `clients` parts, the next cut always where a part is largest."""
    parts = [1] * len(groups)
    heap = [(-len(group), i) for i, group in enumerate(groups)]
    heapq.heapify(heap)
    for _ in range(clients - len(groups)):
        _, i = heap[0]
        parts[i] += 1
        heapq.heapreplace(heap, (-len(groups[i]) / parts[i], i))
    return [part for group, count in zip(groups, parts) for part in np.array_split(group, count)]


def _complete(split: list[np.ndarray], n: int) -> list[np.ndarray]:
    empty = [client for client, rows in enumerate(split) if len(rows) == 0]
    if empty:
        raise _too_few(n, len(split), empty)
    assert np.array_equal(np.sort(np.concatenate(split)), np.arange(n)), (
        "a split must give every row to exactly one client"
    )
    return [np.sort(rows) for rows in split]


def _too_few(n: int, clients: int, empty: Sequence[int]) -> DataError:
    return DataError(
        f"{n} rows are too few for {clients} clients: no row for client {shortened_list(empty, 8)}; lower "
        "data.clients or give more rows "
        "(data.max_rows, data.path)"
    )
