"""Which rows a step trains on, and the arrays it trains with.

Positions are pure functions of (seed, client, step): there is no iterator to save, so a resumed or rescaled
run finds its place by arithmetic, and every rank of a client can compute what the others see.

B: sequences of a batch, T: padded length.
"""

from dataclasses import dataclass

import numpy as np

from fedspeed.data import streams
from fedspeed.data.clients import ClientData
from fedspeed.data.encode import IGNORED, Example

_PAD_MULTIPLE = 8  # lengths in steps of 8 suit tensor cores, and keep the number of distinct shapes small


@dataclass(frozen=True, eq=False)
class Batch:
    """Right-padded sequences; all arrays [B, T] int64.

    Attributes:
        labels: -100 on prompt and padding.
        attention_mask: 1 on tokens, 0 on padding.
        answer_tokens: labels that carry loss after the causal shift, so those in labels[:, 1:].
        cut: which sequences lack the end of their answer, by position in the batch; they are never answered
            exactly.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    attention_mask: np.ndarray
    answer_tokens: int
    cut: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class StepBatches:
    """One rank's share of one local step.

    Attributes:
        micro: the rank's micro-batches, in order.
        step_answer_tokens: answer tokens of the whole step, over all micro-batches of all ranks of the
            client. Dividing every summed loss by it gives the mean over the step's tokens, however unevenly
            the answers fall on ranks and micro-batches.
    """

    micro: list[Batch]
    step_answer_tokens: int


def step_rows(seed: int, client: int, step: int, rows_per_step: int, n_rows: int) -> np.ndarray:
    """Indices [rows_per_step] of the rows of local step `step` (from 0, over the whole run).

    The client walks through permutations of its rows, one an epoch, without a gap: a step may straddle two
    epochs, or several where the client has fewer rows than a step takes.
    """
    positions = np.arange(step * rows_per_step, (step + 1) * rows_per_step)
    epochs = positions // n_rows
    rows = np.empty(rows_per_step, dtype=np.int64)
    for epoch in np.unique(epochs):
        order = np.random.default_rng([seed, streams.EPOCH, client, epoch]).permutation(n_rows)
        here = epochs == epoch
        rows[here] = order[positions[here] % n_rows]
    return rows


def collate(examples: list[Example], pad_id: int, limit: int | None = None) -> Batch:
    """Pads on the right to a multiple of 8, but not beyond `limit`: what no row exceeds, a model may have no
    positions for.
    """
    lengths = np.array([len(example.input_ids) for example in examples])
    width = -(-int(lengths.max()) // _PAD_MULTIPLE) * _PAD_MULTIPLE
    shape = (len(examples), width if limit is None else min(width, limit))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for i, example in enumerate(examples):
        input_ids[i, : lengths[i]] = example.input_ids
        labels[i, : lengths[i]] = example.labels
    attention_mask = (np.arange(shape[1]) < lengths[:, None]).astype(np.int64)
    return Batch(
        input_ids,
        labels,
        attention_mask,
        answer_tokens=sum(example.answer_tokens for example in examples),
        cut=tuple(i for i, example in enumerate(examples) if example.cut),
    )


def client_step(
    data: ClientData,
    seed: int,
    client: int,
    step: int,
    micro_batch: int,
    *,
    accumulation: int,
    ranks: int,
    client_rank: int,
) -> StepBatches:
    """The micro-batches of rank `client_rank` (0 to ranks - 1) of a client in one local step.

    Micro-batch i of all ranks together holds the rows that micro-batch i of a single rank with `ranks` times
    the micro_batch would hold, in the same order.
    """
    rows = step_rows(seed, client, step, accumulation * ranks * micro_batch, len(data.train))
    mine = rows.reshape(accumulation, ranks, micro_batch)[:, client_rank]
    return StepBatches(
        micro=[collate([data.train[row] for row in micro], data.pad_id, data.limit) for micro in mine],
        step_answer_tokens=sum(data.train[row].answer_tokens for row in rows),
    )


def eval_batches(examples: list[Example], batch: int, pad_id: int, limit: int | None = None) -> list[Batch]:
    """All examples once, in order; the last batch may be smaller."""
    return [
        collate(examples[start : start + batch], pad_id, limit) for start in range(0, len(examples), batch)
    ]
