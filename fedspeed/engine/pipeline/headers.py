"""Headers that the ranks of a cluster's pipeline exchange before each common pass. Without torch.

Client slots of a cluster are numbered over all of its ranks; such a number is a global slot.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedspeed.data.batches import Batch
from fedspeed.data.packing import position_ids, row_lengths

IDLE, TRAIN, EVALUATE, STEP, GATHER = range(5)  # kinds of passes


@dataclass(frozen=True)
class MicroBatchHeader:
    """Describe a micro-batch to ranks that do not have its data, without tokens and labels.

    Attributes:
        global_slot: of its client.
        number: of the micro-batch in the client's step.
        seed: of its dropout.
        width: tokens of a sequence, with padding.
        lengths: tokens of each sequence, without padding.
        rows: where sequences hold several rows each, the tokens of each row, sequence by sequence; else none.
    """

    global_slot: int
    number: int
    seed: int
    width: int
    lengths: tuple[int, ...]
    rows: tuple[int, ...] = ()

    @classmethod
    def of(cls, batch: Batch, global_slot: int, number: int, seed: int) -> "MicroBatchHeader":
        """Describe a batch."""
        lengths = tuple(int(n) for n in batch.attention_mask.sum(1))
        rows: tuple[int, ...] = ()
        if batch.position_ids is not None:
            rows = tuple(itertools.chain(*row_lengths(batch.position_ids, lengths)))
        return cls(global_slot, number, seed % 2**62, batch.input_ids.shape[1], lengths, rows=rows)

    def integers(self) -> list[int]:
        """Encode the header as 64-bit integers."""
        described = [self.global_slot, self.number, self.seed, self.width]
        return [*described, len(self.lengths), *self.lengths, len(self.rows), *self.rows]

    def batch(self) -> Batch:
        """Return a batch of the same shape and padding, whose tokens are 0."""
        shape = (len(self.lengths), self.width)
        mask = (np.arange(self.width) < np.array(self.lengths)[:, None]).astype(np.int64)
        zeros = np.zeros(shape, np.int64)
        return Batch(zeros, zeros.copy(), mask, 0, position_ids=self._position_ids())

    def _position_ids(self) -> np.ndarray | None:
        if not self.rows:
            return None
        sequences = []
        rest = iter(self.rows)
        for length in self.lengths:
            rows: list[int] = []
            while sum(rows) < length:
                rows.append(next(rest))
            sequences.append(rows)
        return position_ids(sequences, self.width)


@dataclass(frozen=True)
class PassHeader:
    """Describe what a rank contributes to a pass.

    Attributes:
        kind: of the pass; a rank that has nothing to do says IDLE.
        lr: learning rate, in STEP.
        loaded: (global slot, seed) of the slots whose state was loaded and not sent to the stages yet.
        slots: in STEP the global slots that have gradients, in GATHER those whose state is wanted.
        added: global slots for which arrays to be added to the gradients follow, in STEP.
        perturbed: (global slot, seed, scale) of perturbations since the last pass.
        micros: the micro-batches whose data this rank has.
    """

    kind: int = IDLE
    lr: float = 0.0
    loaded: tuple[tuple[int, int], ...] = ()
    slots: tuple[int, ...] = ()
    added: tuple[int, ...] = ()
    perturbed: tuple[tuple[int, int, float], ...] = ()
    micros: tuple[MicroBatchHeader, ...] = ()

    def integers(self) -> list[int]:
        """Encode the header as 64-bit integers."""
        counts = [len(self.loaded), len(self.slots), len(self.added), len(self.perturbed)]
        loaded = [value for pair in self.loaded for value in pair]
        perturbed = [value for slot, seed, scale in self.perturbed for value in (slot, seed, _bits(scale))]
        micros = [value for micro in self.micros for value in micro.integers()]
        return [self.kind, _bits(self.lr), *counts, *loaded, *self.slots, *self.added, *perturbed, *micros]

    @classmethod
    def read(cls, integers: Sequence[int]) -> "PassHeader":
        """Decode a result of `integers`."""
        kind, lr, *counts = integers[:6]
        rest = iter(integers[6:])
        loaded = tuple((next(rest), next(rest)) for _ in range(counts[0]))
        slots = _take(rest, counts[1])
        added = _take(rest, counts[2])
        perturbed = tuple((next(rest), next(rest), _number(next(rest))) for _ in range(counts[3]))
        micros = []
        for slot in rest:
            number, seed, width, sequences = _take(rest, 4)
            lengths = _take(rest, sequences)
            rows = _take(rest, next(rest))
            micros.append(MicroBatchHeader(slot, number, seed, width, lengths, rows=rows))
        return cls(
            kind=kind,
            lr=_number(lr),
            loaded=loaded,
            slots=slots,
            added=added,
            perturbed=perturbed,
            micros=tuple(micros),
        )


def _take(integers: Iterator[int], count: int) -> tuple[int, ...]:
    return tuple(next(integers) for _ in range(count))


def _bits(value: float) -> int:
    """Return the bits of a float64 as an integer."""
    return int(np.float64(value).view(np.int64))


def _number(bits: int) -> float:
    """Return the float64 with these bits."""
    return float(np.int64(bits).view(np.float64))
