"""Splitters, which assign rows to clients. Pure functions of sizes or categories and a random generator; each
returns one index array a client.

Every row is assigned to exactly one client, and a client without rows is an error.
"""

import heapq
from collections.abc import Hashable, Sequence

import numpy as np

from fedspeed.errors import DataError
from fedspeed.units import shortened_list

_LDA_TRIES = 1000


def iid(n: int, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Shuffle the rows and divide them evenly; sizes differ by at most one.

    Raises:
        DataError: fewer rows than clients.
    """
    return _complete(np.array_split(rng.permutation(n), clients), n)


def meta(categories: Sequence[str], clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Assign one category to each client.

    If there are more categories than clients, clients get several, round-robin. If there are fewer, the
    largest categories are divided evenly among several clients, so that no client has two. The order is
    shuffled.

    Raises:
        DataError: a client would have no row.
    """
    groups = [rng.permutation(group) for group in _groups(categories)]
    groups = _divided(groups, clients) if len(groups) < clients else groups
    order = rng.permutation(len(groups))
    return _complete(
        [np.concatenate([groups[g] for g in order[client::clients]]) for client in range(clients)],
        len(categories),
    )


def lda(categories: Sequence[str], clients: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Divide each category among the clients by a draw from Dirichlet(alpha) (Hsu et al. 2019, arXiv
    1909.06335).

    All draws are repeated until every client has a row.

    Raises:
        DataError: none of 1000 tries succeeded, or there are fewer rows than clients.
    """
    if len(categories) < clients:  # no draw can help
        raise _too_few(len(categories), clients, range(len(categories), clients))
    groups = [rng.permutation(group) for group in _groups(categories)]
    for _ in range(_LDA_TRIES):
        cuts = [_cuts(len(group), rng.dirichlet(np.full(clients, alpha))) for group in groups]
        divided = [np.split(group, cut) for group, cut in zip(groups, cuts)]
        split = [np.concatenate(rows) for rows in zip(*divided)]
        if all(len(rows) for rows in split):
            return _complete(split, len(categories))
    raise DataError(
        f"data.split=lda with data.alpha={alpha:g} left one of {clients} clients without rows in each of "
        f"{_LDA_TRIES} draws ({len(categories)} rows, {len(groups)} categories); raise data.alpha or lower "
        "data.clients"
    )


def by_source(source_of: Sequence[int], clients: int) -> list[np.ndarray]:
    """Assign the rows of source k to client k.

    Args:
        source_of: [rows] the number of each row's source, below `clients`.

    Raises:
        DataError: a client would have no row.
    """
    numbers = np.asarray(source_of, dtype=int)
    return _complete([np.flatnonzero(numbers == client) for client in range(clients)], len(numbers))


def hold_out(order: np.ndarray, texts: Sequence[Hashable], count: int) -> list[int]:
    """Return the rows that a client holds out: the first `count` of `order`, except that equal rows are never
    separated.

    Equal rows are treated as one group at the position of their first row. A group that would exceed `count`
    is skipped. If every group is larger than `count`, the smallest group is held out, unless it is the only
    one.

    Args:
        order: [rows] the row numbers, shuffled. texts: [rows] rows with the same text are equal.
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
    """Return the row indices of each category, categories in sorted order."""
    names = np.asarray(categories, dtype=str)
    return [np.flatnonzero(names == name) for name in np.unique(names)]


def _cuts(size: int, shares: np.ndarray) -> np.ndarray:
    """Return the indices at which to divide `size` rows by the clients' shares, rounded; the last client gets
    the rest.
    """
    return np.minimum(np.rint(np.cumsum(shares)[:-1] * size), size).astype(int)


def _divided(groups: list[np.ndarray], clients: int) -> list[np.ndarray]:
    """Divide groups evenly until there are `clients` parts, next always the group with the largest."""
    counts = [1] * len(groups)
    heap = [(-float(len(group)), i) for i, group in enumerate(groups)]
    heapq.heapify(heap)
    for _ in range(clients - len(groups)):
        _, i = heap[0]
        counts[i] += 1
        heapq.heapreplace(heap, (-len(groups[i]) / counts[i], i))
    return [part for group, count in zip(groups, counts) for part in np.array_split(group, count)]


def _complete(split: list[np.ndarray], n: int) -> list[np.ndarray]:
    """Return a split with sorted indices; check that every client has rows and every row one client."""
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
        "data.clients or give more rows (data.max_rows, data.path)"
    )
