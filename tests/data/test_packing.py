"""Rows that are packed into sequences: which ones, their positions and labels, and what is reported."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedspeed.data.batches import client_step, collate, collate_packed, step_rows
from fedspeed.data.clients import ClientData, client_rows, encode_client
from fedspeed.data.config import DataConfig
from fedspeed.data.encode import Example
from fedspeed.data.packing import pack, position_ids, row_lengths
from fedspeed.data.row_counts import COUNTS, RowTable, count_values
from fedspeed.models.config import ModelConfig
from fedspeed.models.tokenizer import load_tokenizer

LIMIT = 40


@given(st.lists(st.integers(1, LIMIT), min_size=1, max_size=60), st.integers(-1, 3))
def test_every_row_is_in_one_sequence_and_no_two_sequences_would_fit_into_one(lengths, client):
    sequences = pack(lengths, LIMIT, client)
    assert sorted(row for sequence in sequences for row in sequence) == list(range(len(lengths)))
    tokens = [sum(lengths[row] for row in sequence) for sequence in sequences]
    assert max(tokens) <= LIMIT
    assert len(tokens) == 1 or min(a + b for a, b in zip(tokens, tokens[1:])) > LIMIT
    assert sequences == pack(lengths, LIMIT, client)


def test_clients_with_the_same_lengths_pack_other_rows_together():
    assert pack([10] * 40, LIMIT, 0) != pack([10] * 40, LIMIT, 1)


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3))
def test_positions_begin_in_every_row_and_say_where_rows_begin(rows):
    width = max(map(sum, rows)) + 3
    positions = position_ids(rows, width)
    for found, lengths in zip(positions.tolist(), rows):
        behind = width - sum(lengths) + lengths[-1]
        assert found == [i for length in (*lengths[:-1], behind) for i in range(length)]
    assert row_lengths(positions, [sum(lengths) for lengths in rows]) == rows


def example(length, start, first):
    return Example(np.arange(first, first + length, dtype=np.int32), start)


def test_no_row_is_predicted_from_the_one_before_it():
    rows = [example(3, 0, 10), example(4, 2, 20), example(2, 0, 30)]
    batch = collate_packed([rows, [example(5, 1, 40)]], pad_id=9)
    assert batch.input_ids[0].tolist() == [10, 11, 12, 20, 21, 22, 23, 30, 31, *[9] * 7]
    assert batch.labels[0].tolist() == [10, 11, 12, -100, -100, 22, 23, -100, 31, *[-100] * 7]
    assert batch.position_ids[0, :9].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1]
    assert batch.position_ids[1].tolist() == list(range(16))
    assert batch.answer_tokens == (batch.labels[:, 1:] != -100).sum() == 2 + 2 + 1 + 4


def test_sequences_of_one_row_each_are_as_they_are_without_packing():
    rows = [example(3, 0, 10), replace(example(4, 2, 20), cut=True)]
    packed = collate_packed([[row] for row in rows], 0)
    plain = collate(rows, 0)
    assert packed.position_ids is None and (packed.cut, plain.cut) == ((), (1,))
    assert np.array_equal(packed.labels, plain.labels)


def test_a_step_is_a_function_of_seed_client_and_step_and_an_epoch_has_every_row_once():
    train = [example(4 + i % 11, 1 + i % 3, 100 * i) for i in range(30)]
    packed = pack([len(row.input_ids) for row in train], LIMIT, 2)
    data = ClientData(train, [], pad_id=9, limit=LIMIT, packed=packed)
    seen = []
    for number in range(len(packed)):
        step = client_step(data, 5, 2, number, micro_batch=1, accumulation=1, ranks=1, client_rank=0)
        [sequence] = step_rows(5, 2, number, 1, len(packed))
        [micro] = step.micro
        assert micro.input_ids.shape[1] <= LIMIT
        assert step.step_answer_tokens == micro.answer_tokens
        starts = micro.input_ids[0][(micro.input_ids[0] % 100 == 0) & (micro.attention_mask[0] == 1)]
        assert (starts // 100).tolist() == list(packed[sequence])
        seen += packed[sequence]
    assert sorted(seen) == list(range(30))
    assert data.weight == replace(data, packed=None).weight
    assert data.longest <= LIMIT and replace(data, packed=None).longest == 14


def test_the_start_says_how_many_rows_went_into_how_many_sequences():
    config = DataConfig(task="builtin", clients=2, max_rows=60, max_tokens=128, packing=True)
    tokenizer = load_tokenizer(ModelConfig(tokenizer="bytes"))
    rows = client_rows(config, 0)
    clients = [encode_client(some, tokenizer, config) for some in rows]
    plain = [encode_client(some, tokenizer, replace(config, packing=False)) for some in rows]
    values = [value for client in clients for value in count_values(client.counts)]
    assert len(values) == 2 * COUNTS
    packed = sum(len(client.train) for client in clients)
    sequences = sum(len(client.sequences) for client in clients)
    assert sequences < packed / 2
    said = f"{packed} training rows packed into {sequences} sequences of up to 128 tokens (data.packing)"
    assert RowTable.from_values(values, 128, sums_only=False).line().endswith(said)
    assert [client.weight for client in clients] == [client.weight for client in plain]
    assert "packed" not in RowTable.of([client.counts for client in plain], 128).line()
