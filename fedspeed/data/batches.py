"""The rows that a local step trains on, and the arrays that are made of them.

The rows of a step are a pure function of (seed, client, step). There is no iterator whose state must be
saved: a resumed run computes the same rows, also on another number of ranks, and every rank of a client can
compute what the others train on.

B: sequences of a batch, T: padded length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedspeed.data import streams
from fedspeed.data.clients import ClientData
from fedspeed.data.encode import IGNORED, Example
from fedspeed.data.packing import position_ids

_PAD_MULTIPLE = 8  # suits tensor cores, and keeps the number of different shapes small


@dataclass(frozen=True, eq=False)
class Batch:
    """Right-padded sequences; all arrays [B, T] int64.

    Attributes:
        labels: -100 on prompt and padding.
        attention_mask: 1 on tokens, 0 on padding.
        answer_tokens: labels that carry loss after the causal shift, so those in labels[:, 1:].
        cut: indices of the sequences whose answer was truncated; they never count as answered exactly.
        position_ids: of each token in its row, from 0, where a sequence holds several rows (data.packing):
            a token then attends to its own row only. None where each sequence is one row.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    attention_mask: np.ndarray
    answer_tokens: int
    cut: tuple[int, ...] = ()
    position_ids: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class StepBatches:
    """One rank's share of one local step.

    Attributes:
        micro: the rank's micro-batches, in order.
        step_answer_tokens: answer tokens of the whole step, over all micro-batches of all ranks of the
            client. Every summed loss is divided by it, which gives the mean over the step's tokens however
            unevenly they are distributed over ranks and micro-batches.
    """

    micro: list[Batch]
    step_answer_tokens: int


def step_rows(seed: int, client: int, step: int, rows_per_step: int, n_rows: int) -> np.ndarray:
    """Return the indices [rows_per_step] of the rows (with data.packing: of the sequences of rows) of local
    step `step`, counted from 0 over the whole run.

    A client goes through a new permutation of its rows in every epoch. A step may include the end of one
    epoch and the beginning of the next, or several epochs where the client has fewer rows than a step takes.
    """
    positions = np.arange(step * rows_per_step, (step + 1) * rows_per_step)
    epochs = positions // n_rows
    rows = np.empty(rows_per_step, dtype=np.int64)
    for epoch in np.unique(epochs):
        order = np.random.default_rng([seed, streams.EPOCH, client, epoch]).permutation(n_rows)
        in_epoch = epochs == epoch
        rows[in_epoch] = order[positions[in_epoch] % n_rows]
    return rows


def epoch_steps(n_rows: int, rows_per_step: int) -> int:
    """Return how many local steps go once through `n_rows` rows; the last one may begin the next epoch."""
    return max(1, -(-n_rows // rows_per_step))


def collate(examples: list[Example], pad_id: int, limit: int | None = None) -> Batch:
    """Return a batch of examples, padded on the right to a multiple of 8 tokens.

    Args:
        pad_id: token id of padding. limit: longest length to pad to, since the model may have no positions
            beyond; no example is longer.
    """
    batch = collate_packed([[example] for example in examples], pad_id, limit)
    return replace(batch, cut=tuple(i for i, example in enumerate(examples) if example.cut))


def collate_packed(sequences: Sequence[Sequence[Example]], pad_id: int, limit: int | None = None) -> Batch:
    """Return a batch of sequences of one or more examples each, padded as by `collate`. The first token of an
    example is not predicted from the example before it.

    Args:
        pad_id, limit: see `collate`. No sequence is longer than the limit.
    """
    rows = [[len(example.input_ids) for example in sequence] for sequence in sequences]
    lengths = np.array([sum(tokens) for tokens in rows])
    width = -(-int(lengths.max()) // _PAD_MULTIPLE) * _PAD_MULTIPLE
    shape = (len(sequences), width if limit is None else min(width, limit))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for i, sequence in enumerate(sequences):
        input_ids[i, : lengths[i]] = np.concatenate([example.input_ids for example in sequence])
        labels[i, : lengths[i]] = np.concatenate([example.labels for example in sequence])
        labels[i, np.cumsum(rows[i])[:-1]] = IGNORED
    return Batch(
        input_ids,
        labels,
        attention_mask=(np.arange(shape[1]) < lengths[:, None]).astype(np.int64),
        answer_tokens=sum(example.answer_tokens for sequence in sequences for example in sequence),
        position_ids=position_ids(rows, shape[1]) if max(map(len, rows)) > 1 else None,
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
    """Return the micro-batches of one rank of a client in one local step.

    Micro-batch i of all ranks together has the rows, in the same order, that micro-batch i of a single rank
    would have with `ranks` times the `micro_batch`. With data.packing, "row" stands for a sequence of rows.

    Args:
        step: counted from 0 over the whole run. micro_batch: sequences of a micro-batch on one rank.
        accumulation: micro-batches of a step. client_rank: the rank's number among the client's `ranks`
            ranks.
    """
    sequences = data.sequences
    numbers = step_rows(seed, client, step, accumulation * ranks * micro_batch, len(sequences))
    of_rank = numbers.reshape(accumulation, ranks, micro_batch)[:, client_rank]

    def examples(number: int) -> list[Example]:
        return [data.train[row] for row in sequences[number]]

    return StepBatches(
        micro=[
            collate_packed([examples(number) for number in micro], data.pad_id, data.limit)
            for micro in of_rank.tolist()
        ],
        step_answer_tokens=sum(
            example.answer_tokens for number in numbers.tolist() for example in examples(number)
        ),
    )


def eval_batches(examples: list[Example], batch: int, pad_id: int, limit: int | None = None) -> list[Batch]:
    """Return batches of all examples in order; the last one may be smaller.

    Args:
        batch: sequences of a batch. pad_id, limit: see `collate`.
    """
    return [
        collate(examples[start : start + batch], pad_id, limit) for start in range(0, len(examples), batch)
    ]
