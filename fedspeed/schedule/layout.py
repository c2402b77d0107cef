"""Which blocks a rank of a pipeline holds. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """`chunks`: consecutive blocks, in the model's order; `holders`: the rank of each. A chunk's
    micro-batches stay on its rank until they are through.
    """

    chunks: tuple[range, ...]
    holders: tuple[int, ...]

    @property
    def ranks(self) -> int:
        return max(self.holders) + 1

    def blocks_of(self, rank: int) -> list[int]:
        return [b for chunk, holder in zip(self.chunks, self.holders) if holder == rank for b in chunk]


def stages(cuts: Sequence[int]) -> Layout:
    """One chunk for each rank: rank i holds blocks [cuts[i], cuts[i + 1])."""
    return Layout(tuple(range(a, b) for a, b in zip(cuts, cuts[1:])), tuple(range(len(cuts) - 1)))


def interleaved(blocks: int, ranks: int, of_a_chunk: int) -> Layout:
    """Chunks of at most so many blocks, dealt to the ranks in turn."""
    chunks = max(ranks, -(-blocks // of_a_chunk))
    cuts = [blocks * k // chunks for k in range(chunks + 1)]
    return Layout(tuple(range(a, b) for a, b in zip(cuts, cuts[1:])), tuple(k % ranks for k in range(chunks)))
