"""What ranks of a cluster's pipeline tell each other before a pass that all of them make together. Pure
values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedspeed.data.batches import Batch

IDLE, TRAIN, EVALUATE, STEP, GATHER = range(5)  # what a pass of a cluster is


@dataclass(frozen=True)
class MicroBatchHeader:
    """A micro-batch as its owner tells the others: whose it is, its shape and padding, the seed of its
    dropout; no token and no label.

    Attributes:
        place: whose it is, among all client slots of the cluster.
    """

    place: int
    number: int
    seed: int
    width: int
    lengths: tuple[int, ...]

    def integers(self) -> list[int]:
        return [self.place, self.number, self.seed, self.width, len(self.lengths), *self.lengths]

    def batch(self) -> Batch:
        shape = (len(self.lengths), self.width)
        mask = (np.arange(self.width) < np.array(self.lengths)[:, None]).astype(np.int64)
        return Batch(np.zeros(shape, np.int64), np.zeros(shape, np.int64), mask, 0)


def tell(place: int, number: int, seed: int, batch: Batch) -> MicroBatchHeader:
    """Make what is told of a micro-batch."""
    lengths = tuple(int(n) for n in batch.attention_mask.sum(1))
    return MicroBatchHeader(place, number, seed % 2**62, batch.input_ids.shape[1], lengths)


@dataclass(frozen=True)
class PassHeader:
    """What a rank says before a pass.

    Attributes:
        lr: of the steps, in STEP.
        fresh: (place, seed of the turn) of the client slots whose state their owner has loaded and not told
            yet.
        named: places that are meant: in STEP those whose gradients wait, in GATHER those whose state is
            wanted.
        added: places for which arrays to be added to the gradients follow, in STEP.
        moves: (place, seed, scale) of perturbations since the last pass.
    """

    kind: int = IDLE
    lr: float = 0.0
    fresh: tuple[tuple[int, int], ...] = ()
    named: tuple[int, ...] = ()
    added: tuple[int, ...] = ()
    moves: tuple[tuple[int, int, float], ...] = ()
    micros: tuple[MicroBatchHeader, ...] = ()

    def integers(self) -> list[int]:
        """All of it as 64-bit integers."""
        counts = [len(self.fresh), len(self.named), len(self.added), len(self.moves)]
        pairs = [value for pair in self.fresh for value in pair]
        moves = [value for place, seed, scale in self.moves for value in (place, seed, _bits(scale))]
        micros = [value for micro in self.micros for value in micro.integers()]
        return [self.kind, _bits(self.lr), *counts, *pairs, *self.named, *self.added, *moves, *micros]

    @classmethod
    def read(cls, integers: Sequence[int]) -> "PassHeader":
        """Read what `integers` gives."""
        kind, lr, *counts = integers[:6]
        rest = iter(integers[6:])

        def take(count: int) -> tuple[int, ...]:
            return tuple(next(rest) for _ in range(count))

        fresh = tuple(take(2) for _ in range(counts[0]))
        named = take(counts[1])
        added = take(counts[2])
        moves = tuple(
            (place, seed, _number(bits)) for place, seed, bits in (take(3) for _ in range(counts[3]))
        )
        micros = []
        for place in rest:
            number, seed, width, rows = take(4)
            micros.append(MicroBatchHeader(place, number, seed, width, take(rows)))
        return cls(kind, _number(lr), fresh, named, added, moves, tuple(micros))


def _bits(value: float) -> int:
    return int(np.float64(value).view(np.int64))


def _number(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))
