"""Splitters, as properties: every row at exactly one client, nobody empty, and each splitter's own
promise.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspeed.data.splitters import hold_out, iid, lda, meta
from fedspeed.errors import DataError

seeds = st.integers(0, 2**32 - 1)
category_lists = st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=120)


def assert_partition(split, n, clients):
    assert len(split) == clients
    assert all(len(rows) for rows in split)
    assert sorted(np.concatenate(split).tolist()) == list(range(n))


def held(split, categories):
    return [{categories[i] for i in rows} for rows in split]


@given(st.integers(1, 200), st.integers(1, 20), seeds)
@settings(deadline=None)
def test_iid(n, clients, seed):
    if n < clients:
        with pytest.raises(DataError, match="lower data.clients"):
            iid(n, clients, np.random.default_rng(seed))
        return
    split = iid(n, clients, np.random.default_rng(seed))
    assert_partition(split, n, clients)
    assert max(map(len, split)) - min(map(len, split)) <= 1


def test_iid_shuffles_and_is_deterministic():
    first, again, other = (iid(7473, 3, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert [len(rows) for rows in first] == [2491, 2491, 2491]
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not np.array_equal(first[0], other[0])
    assert 0.3 < np.mean(first[0] < 7473 // 2) < 0.7  # the client's rows come from all over the file


@given(category_lists, st.integers(1, 12), seeds)
@settings(deadline=None)
def test_meta(categories, clients, seed):
    if len(categories) < clients:
        with pytest.raises(DataError, match="no row for client"):
            meta(categories, clients, np.random.default_rng(seed))
        return
    split = meta(categories, clients, np.random.default_rng(seed))
    assert_partition(split, len(categories), clients)
    names = set(categories)
    per_client = [len(of) for of in held(split, categories)]
    assert sum(per_client) == max(len(names), clients)  # a category is divided only where there are too few
    assert max(per_client) - min(per_client) <= 1  # surplus is merged round-robin


def test_meta_divides_the_largest_evenly():
    categories = ["big"] * 90 + ["mid"] * 40 + ["low"] * 10
    split = meta(categories, 5, np.random.default_rng(0))
    sizes = sorted((of.pop(), len(rows)) for of, rows in zip(held(split, categories), split))
    assert sizes == [("big", 30), ("big", 30), ("big", 30), ("low", 10), ("mid", 40)]


def test_meta_deals_categories_in_shuffled_order():
    categories = [name for name in "abcdef" for _ in range(3)]
    orders = {
        tuple(map(frozenset, held(meta(categories, 6, np.random.default_rng(seed)), categories)))
        for seed in range(5)
    }
    assert len(orders) > 1


@given(category_lists, st.integers(1, 6), st.sampled_from([0.3, 1.0, 100.0]), seeds)
@settings(deadline=None, max_examples=60)
def test_lda(categories, clients, alpha, seed):
    try:
        split = lda(categories, clients, alpha, np.random.default_rng(seed))
    except DataError:
        assert len(categories) < 10 * clients  # only scarce rows may leave a client empty in a thousand draws
        return
    assert_partition(split, len(categories), clients)


def test_lda_alpha_sets_the_skew():
    categories = [name for name in "abcd" for _ in range(1000)]

    def skew(alpha):
        split = lda(categories, 4, alpha, np.random.default_rng(1))
        shares = (
            np.array([[sum(categories[i] == name for i in rows) for name in "abcd"] for rows in split]) / 1000
        )
        return shares.max(axis=0).mean()

    assert skew(1000.0) < 0.3
    assert skew(0.05) > 0.6


def test_lda_gives_up_with_a_remedy():
    with pytest.raises(
        DataError,
        match=r"data.alpha=0.001 left one of 3 clients without rows in each of 1000 draws.*raise data.alpha "
        r"or lower",
    ):
        lda(["a", "a", "a"], 3, 0.001, np.random.default_rng(0))


def test_lda_does_not_try_what_cannot_be():
    with pytest.raises(
        DataError,
        match="2 rows are too few for 10000 clients: no row for client 2, 3, 4, 5, 6, 7, 8, 9 and 9990 more",
    ):
        lda(["a", "a"], 10000, 0.5, np.random.default_rng(0))


def test_a_client_without_rows_is_named():
    with pytest.raises(
        DataError, match="2 rows are too few for 4 clients: no row for client 2, 3; lower data.clients"
    ):
        iid(2, 4, np.random.default_rng(0))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(0, 20), seeds)
@settings(deadline=None)
def test_equal_rows_are_held_out_together(texts, count, seed):
    count = min(count, len(texts) - 1)
    order = np.random.default_rng(seed).permutation(len(texts))
    val = hold_out(order, texts, count)
    train = [row for row in range(len(texts)) if row not in val]
    assert train and len(set(val)) == len(val)
    assert not {texts[row] for row in val} & {texts[row] for row in train}
    copies = min(texts.count(text) for text in texts)
    assert len(val) <= max(count, copies)
    assert bool(val) == (count > 0 and len(set(texts)) > 1)
    assert val == hold_out(order, texts, count)


@given(st.integers(1, 80), st.integers(0, 30), seeds)
@settings(deadline=None)
def test_rows_without_copies_are_held_out_in_order(rows, count, seed):
    order = np.random.default_rng(seed).permutation(rows)
    assert hold_out(order, range(rows), min(count, rows)) == order[:count].tolist()


def test_many_copies_do_not_crowd_single_rows_out():
    """The first row of the order has more copies than may be held out: the next ones fill the place."""
    assert hold_out(np.arange(10), ["a"] * 6 + ["b", "c", "d", "d"], 4) == [6, 7, 8, 9]
    assert hold_out(np.arange(10), ["a"] * 6 + ["b", "c", "d", "d"], 3) == [6, 7]
    assert hold_out(np.arange(6), ["a"] * 4 + ["b", "b"], 1) == [4, 5], "no row is single: the fewest copies"
