"""Generation without a model: choices of tokens, batches, caches, and the order of pieces."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fedspeed.engine.generation.batches import (
    BatchLimits,
    Context,
    common_prefix,
    divide_contexts,
    divide_rows,
    right_aligned,
)
from fedspeed.engine.generation.cache import Segment, View
from fedspeed.engine.generation.decode import AnswerSettings, generate_answers
from fedspeed.engine.generation.piece_messages import PieceReceiver, PieceSender
from fedspeed.engine.generation.pieces import Group, read_nothing
from fedspeed.engine.generation.sampling import Draw, Sampling
from fedspeed.engine.generation.segment_attention import SegmentAttention
from fedspeed.errors import FedSpeedError

LIMITS = BatchLimits(
    slot_bytes=1, blocks=2, cache_bytes=10_000, batch_tokens=1_000, piece_tokens=100, step_tokens=50
)


def chosen(sampling, logits, count=1):
    return sampling.choose(
        torch.tensor(logits).log().expand(count, -1), [Draw(i, 0, 0) for i in range(count)]
    ).tolist()


def test_tokens_are_drawn_as_often_as_they_are_probable():
    found = np.bincount(chosen(Sampling(temperature=1.0), [0.1, 0.6, 0.3], 4000), minlength=3) / 4000
    assert np.abs(found - [0.1, 0.6, 0.3]).max() < 0.03
    squared = np.array([0.01, 0.36, 0.09]) / 0.46  # half the temperature
    found = np.bincount(chosen(Sampling(temperature=0.5), [0.1, 0.6, 0.3], 4000), minlength=3) / 4000
    assert np.abs(found - squared).max() < 0.03


@pytest.mark.parametrize(
    "top_p,drawn", [(0.5, {1}), (0.6, {1}), (0.61, {1, 2}), (0.95, {0, 1, 2}), (1.0, {0, 1, 2})]
)
def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p(top_p, drawn):
    assert set(chosen(Sampling(temperature=1.0, top_p=top_p), [0.1, 0.6, 0.3], 500)) == drawn


def test_a_choice_depends_on_its_own_numbers_only():
    sampling = Sampling(temperature=1.0, seed=3)
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    draws = [Draw(i % 3, i, i * i) for i in range(8)]
    together = sampling.choose(logits, draws).tolist()
    assert together == [int(sampling.choose(logits[i : i + 1], draws[i : i + 1])) for i in range(8)]
    numbers = sampling.random_numbers([Draw(0, 0, 0), Draw(0, 0, 1), Draw(0, 1, 0), Draw(1, 0, 0)])
    assert len(set(numbers)) == 4
    assert not set(numbers) & set(Sampling(temperature=1.0, seed=4).random_numbers(draws))


@pytest.mark.parametrize(
    "values", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_values_out_of_range_are_refused(values):
    with pytest.raises(FedSpeedError, match=f"{next(iter(values))}="):
        Sampling(**values)


def test_a_common_prefix_leaves_each_prompt_a_token():
    rows = [np.array(row) for row in ([1, 2, 3, 4], [1, 2, 3], [1, 2, 5, 6])]
    assert [
        common_prefix(rows),
        common_prefix(rows[:2]),
        common_prefix(rows[:1]),
        common_prefix([np.array([7]), np.array([7])]),
    ] == [2, 2, 3, 0]


def test_batches_have_every_context_once_and_stay_within_the_limits():
    rng = np.random.default_rng(0)
    contexts = [
        Context(int(tokens), int(rows), 20, 1)
        for tokens, rows in zip(rng.integers(1, 60, 40), rng.integers(1, 9, 40))
    ]
    batches = divide_contexts(contexts, LIMITS, 7)
    assert sorted(i for batch in batches for group in batch for i in group) == list(range(40))
    for batch in batches:
        sizes = [[contexts[i] for i in group] for group in batch]
        assert LIMITS.allow_batch(sizes, 7)
        assert all(LIMITS.allow_group(group, 7) for group in sizes)
    assert 1 < len(batches) < sum(map(len, batches)) < 40
    # A context larger than all limits is a batch of its own, and rows are divided first.
    assert divide_contexts([Context(5_000, 1, 1, 1)] * 2, LIMITS, 0) == [[[0]], [[1]]]
    parts = divide_rows(Context(10, 120, 20, 1), LIMITS, 0)
    assert [i for part in parts for i in part] == list(range(120)) and max(map(len, parts)) <= 50


def test_a_view_shows_tokens_before_and_never_padding():
    tokens, real = right_aligned([np.array([5, 6, 7]), np.array([8])])
    assert tokens.tolist() == [[5, 6, 7], [0, 0, 8]] and real.tolist() == [[True] * 3, [False, False, True]]
    tail = Segment(2)
    answers = Segment(3)
    first = View([], tail, np.array([[0, 1, 2], [-1, -1, 0]]))
    assert first.attended().astype(int).tolist() == [
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
        [[0, 0, 0], [0, 0, 0], [0, 0, 1]],
    ]
    assert first.attended(2)[0].astype(int).tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    keys = torch.arange(6.0).view(2, 1, 3, 1)
    assert torch.equal(first.update(keys, -keys, 4)[0], keys)
    behind = np.array([1, 0, 0])  # three rows continue two contexts
    step = View([(tail, behind)], answers, np.array([[1], [3], [3]]))
    assert step.attended()[:, 0].astype(int).tolist() == [[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert step.attended(2)[:, 0].astype(int).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]
    new = torch.tensor([10.0, 20.0, 30.0]).view(3, 1, 1, 1)
    assert step.update(new, -new, 4)[0].flatten(1).tolist() == [[3, 4, 5, 10], [0, 1, 2, 20], [0, 1, 2, 30]]
    again = View([(tail, behind[[0, 2]])], answers, np.array([[2], [4]]), kept=np.array([0, 2]))
    assert again.update(new[:2], -new[:2], 4)[1].flatten(1).tolist() == [
        [-3, -4, -5, -10, -10],
        [0, -1, -2, -30, -20],
    ]


def test_a_rank_that_receives_pieces_follows_them_without_their_tokens():
    sender = PieceSender()
    receiver = PieceReceiver()
    group = Group([np.array([5, 6, 7]), np.array([8])], None)
    shown = []

    def follow(piece):
        integers = sender.integers([piece])
        [other] = receiver.pieces(integers)
        assert np.array_equal(other.view.attended(), piece.view.attended()) and np.array_equal(
            other.positions, piece.positions
        )
        assert not other.tokens.any() and other.count == 0
        shown.append(
            other.view
            .update(*[torch.full((*piece.tokens.shape, 1), float(len(shown))).unsqueeze(1)] * 2, 0)[0]
            .flatten(1)
            .tolist()
        )

    follow(group.begin(np.array([0, 1]), read_nothing, reads_tokens=True))
    follow(group.follow(np.array([0, 0, 1]), [np.array([9])] * 3, read_nothing, reads_tokens=True))
    group.keep(np.array([0, 2]))
    group.keep(np.array([1]))
    follow(group.follow(np.array([1]), [np.array([9])], read_nothing, reads_tokens=True))
    assert shown == [[[0] * 3] * 2, [[0] * 3 + [1]] * 3, [[0] * 3 + [1, 2]]]
    assert len(receiver._segments) == 2
    del group
    assert receiver.pieces(sender.integers([])) == [] and not receiver._segments


def test_what_prompts_begin_with_is_computed_once_and_rows_that_stop_are_dropped():
    """The model of this test continues every row with the number of tokens that the row has."""
    prompts = [np.array([9, 9, 9, *rest]) for rest in ([1], [2, 2], [3, 3, 3])]
    work = generate_answers(
        list(enumerate(prompts)),
        AnswerSettings(max_new=4, samples=2, stop=frozenset([6]), sampling=Sampling()),
        LIMITS,
    )
    values = None
    passes = []
    try:
        while True:
            pieces = work.send(values)
            passes.append([(piece.tokens.shape, piece.count) for piece in pieces])
            values = [piece.positions[piece.wanted] + 1 for piece in pieces]
    except StopIteration as end:
        found = {(prompt, sample): tokens.tolist() for prompt, sample, tokens in end.value}
    assert passes == [[((1, 3), 0)], [((3, 3), 6)], [((4, 1), 4)], [((2, 1), 2)]]
    assert found == {(0, 0): [4, 5], (0, 1): [4, 5], (1, 0): [5], (1, 1): [5], (2, 0): [], (2, 1): []}


def test_attention_by_segments_is_attention_to_all_of_them():
    """Rows share a prefix, have contexts in common, some of them none, and the sizes of groups differ."""
    prefix = Segment(1)
    contexts = Segment(3)
    into = Segment(4)
    width = 8
    heads = 4
    key_heads = 2

    def drawn(rows, slots):
        return torch.randn(rows, key_heads, slots, width)

    prefix_view = View([], prefix, np.arange(5)[None])
    prefix_view.update(drawn(1, 5), drawn(1, 5), 0)
    of_prefix = (prefix, np.zeros(3, dtype=np.int64))
    View([of_prefix], contexts, np.array([[5, 6], [-1, 5], [5, 6]])).update(drawn(3, 2), drawn(3, 2), 0)
    behind = np.array([2, 0, 2, 2])  # none follows context 1
    config = SimpleNamespace(_attn_implementation="sdpa")
    module = SimpleNamespace(layer_idx=0, num_key_value_groups=2, is_causal=True)
    before = [(prefix, np.zeros(4, dtype=np.int64)), (contexts, behind)]
    for window, tokens in ((None, 1), (3, 1), (None, 2), (1, 2)):
        start = into.positions.max(initial=6) + 1
        view = View(before, into, np.tile(np.arange(start, start + tokens), (4, 1)))
        mask = torch.zeros(4, 1, tokens, view._all_positions.shape[1])
        mask.masked_fill_(~torch.from_numpy(view.attended(window)).unsqueeze(1), torch.finfo(mask.dtype).min)
        query = torch.randn(4, heads, tokens, width)
        keys, values = view.update(drawn(4, tokens), drawn(4, tokens), 0)
        expected, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, keys, values, mask, scaling=0.3)
        with SegmentAttention(view).used(config):
            own = into.keys_and_values(0)
            found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *own, mask, scaling=0.3)
        assert torch.allclose(found, expected, atol=1e-6)
        assert keys.shape[2] > own[0].shape[2] and not view.separate
    assert type(ALL_ATTENTION_FUNCTIONS["sdpa"]) is not partial
