"""Which blocks each rank of a pipeline has. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """The assignment of blocks to ranks.

    Attributes:
        chunks: consecutive blocks, in the model's order.
        holders: the rank of each chunk.
    """

    chunks: tuple[range, ...]
    holders: tuple[int, ...]

    @property
    def ranks(self) -> int:
        """Return the number of ranks."""
        return max(self.holders) + 1

    def blocks_of(self, rank: int) -> list[int]:
        """Return all blocks of a rank."""
        return [b for chunk, holder in zip(self.chunks, self.holders) if holder == rank for b in chunk]


def stages(cuts: Sequence[int]) -> Layout:
    """Give each rank one chunk: rank i has the blocks [cuts[i], cuts[i + 1])."""
    return Layout(tuple(range(a, b) for a, b in zip(cuts, cuts[1:])), tuple(range(len(cuts) - 1)))


def interleaved(blocks: int, ranks: int, max_chunk: int) -> Layout:
    """Divide the blocks into chunks of at most `max_chunk`, at least one a rank, and assign them to the ranks
    in turn.
    """
    chunks = max(ranks, -(-blocks // max_chunk))
    cuts = [blocks * k // chunks for k in range(chunks + 1)]
    return Layout(tuple(range(a, b) for a, b in zip(cuts, cuts[1:])), tuple(k % ranks for k in range(chunks)))
