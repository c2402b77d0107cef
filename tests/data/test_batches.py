"""Positions are arithmetic: epochs without gap or repeat, any cut over ranks sees the same rows, resuming is
asking again.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedspeed.data.batches import client_step, collate, eval_batches, step_rows
from fedspeed.data.clients import ClientData
from fedspeed.data.encode import Example


def example(length, labels_start, first=0):
    return Example(np.arange(first, first + length, dtype=np.int32), labels_start)


def client_data(n):
    """Example i holds the ids 100 i, 100 i + 1, ..., has 4 to 14 tokens and 1 to 3 of them in the prompt."""
    return ClientData([example(4 + i % 11, 1 + i % 3, first=100 * i) for i in range(n)], [], pad_id=9)


@given(st.integers(1, 30), st.integers(1, 17), st.integers(0, 2**32 - 1))
def test_steps_walk_through_whole_epochs(n_rows, rows_per_step, seed):
    steps = -(-3 * n_rows // rows_per_step)
    walk = np.concatenate([step_rows(seed, 2, step, rows_per_step, n_rows) for step in range(steps)])
    for epoch in range(3):
        assert sorted(walk[epoch * n_rows : (epoch + 1) * n_rows].tolist()) == list(range(n_rows))


def test_order_differs_by_epoch_client_and_seed():
    orders = [
        step_rows(seed, client, step, 50, 50).tolist()
        for seed, client, step in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))
    ]
    assert len(set(map(tuple, orders))) == 4
    assert orders[0] == step_rows(0, 0, 0, 50, 50).tolist()


def test_steps_do_not_depend_on_how_many_rows_a_step_takes():
    small = np.concatenate([step_rows(3, 1, step, 2, 7) for step in range(6)])
    large = np.concatenate([step_rows(3, 1, step, 4, 7) for step in range(3)])
    assert np.array_equal(small, large)


def test_collate():
    batch = collate([example(3, 1), replace(example(9, 8, first=20), cut=True)], pad_id=99)
    assert batch.cut == (1,)
    assert batch.input_ids.dtype == batch.labels.dtype == batch.attention_mask.dtype == np.int64
    assert batch.input_ids.tolist() == [[0, 1, 2] + [99] * 13, [*range(20, 29)] + [99] * 7]
    assert batch.labels.tolist() == [[-100, 1, 2] + [-100] * 13, [-100] * 8 + [28] + [-100] * 7]
    assert batch.attention_mask.tolist() == [[1] * 3 + [0] * 13, [1] * 9 + [0] * 7]
    assert batch.answer_tokens == 3


@pytest.mark.parametrize(("longest", "padded"), [(1, 8), (8, 8), (9, 16), (16, 16)])
def test_lengths_are_multiples_of_eight(longest, padded):
    assert collate([example(longest, 0)], 0).input_ids.shape == (1, padded)


@given(st.lists(st.tuples(st.integers(2, 20), st.integers(0, 10)), min_size=1, max_size=5))
def test_answer_tokens_are_counted_after_the_shift(shapes):
    batch = collate([example(length, min(start, length - 1)) for length, start in shapes], 0)
    assert batch.answer_tokens == (batch.labels[:, 1:] != -100).sum()


def rows_of(batch):
    """Each row of a batch without its padding: its ids, and the same with the prompt masked."""
    lengths = batch.attention_mask.sum(axis=1)
    assert all(
        (row[n:] == 9).all() and (labels[n:] == -100).all()
        for row, labels, n in zip(batch.input_ids, batch.labels, lengths)
    )
    return [
        (row[:n].tolist(), labels[:n].tolist())
        for row, labels, n in zip(batch.input_ids, batch.labels, lengths)
    ]


@pytest.mark.parametrize("step", [0, 1, 7])
def test_two_ranks_see_what_one_rank_of_twice_the_batch_sees(step):
    data = client_data(13)
    one = client_step(data, 0, 4, step, micro_batch=4, accumulation=3, ranks=1, client_rank=0)
    two = [
        client_step(data, 0, 4, step, micro_batch=2, accumulation=3, ranks=2, client_rank=rank)
        for rank in (0, 1)
    ]
    for whole, first, second in zip(one.micro, two[0].micro, two[1].micro, strict=True):
        assert rows_of(whole) == rows_of(first) + rows_of(second)
    assert one.step_answer_tokens == two[0].step_answer_tokens == two[1].step_answer_tokens


def test_a_step_holds_the_rows_of_step_rows_and_counts_their_tokens():
    data = client_data(13)
    step = client_step(data, 5, 2, 3, micro_batch=2, accumulation=4, ranks=1, client_rank=0)
    assert len(step.micro) == 4
    seen = [ids[0] // 100 for micro in step.micro for ids, _ in rows_of(micro)]
    assert seen == step_rows(5, 2, 3, 8, 13).tolist()
    assert step.step_answer_tokens == sum(micro.answer_tokens for micro in step.micro)


def test_ranks_share_a_step_without_overlap():
    data = client_data(24)
    ranks = [
        client_step(data, 0, 0, 0, micro_batch=2, accumulation=4, ranks=3, client_rank=rank)
        for rank in range(3)
    ]
    firsts = [ids[0] for of in ranks for micro in of.micro for ids, _ in rows_of(micro)]
    assert sorted(firsts) == [100 * i for i in range(24)]
    assert {of.step_answer_tokens for of in ranks} == {
        sum(micro.answer_tokens for of in ranks for micro in of.micro)
    }


def test_eval_batches_hold_every_example_once_in_order():
    examples = client_data(7).train
    batches = eval_batches(examples, 3, pad_id=9)
    assert [len(batch.input_ids) for batch in batches] == [3, 3, 1]
    assert [ids for batch in batches for ids, _ in rows_of(batch)] == [
        example.input_ids.tolist() for example in examples
    ]
    assert eval_batches([], 3, pad_id=9) == []
