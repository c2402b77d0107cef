"""Keep the number of passes equal on ranks that share the base.

Where ranks gather weights from each other, every pass is a matched collective: all of them must make the same
number of passes. `matched_passes` agrees on that number, and a rank with fewer passes makes idle ones that
train nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from deepspeed import comm as dist

from fedspeed.engine.clock import Clock
from fedspeed.engine.groups import Groups

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MatchedPasses(ABC):
    """The part of a `ClientEngine` that keeps passes matched.

    Attributes:
        groups: process groups of this rank.
    """

    groups: Groups
    _matched_group: (
        "ProcessGroup | None"  # ranks that must make the same passes; None: this rank is independent
    )
    _device: torch.device
    _clock: Clock

    def _begin_unmatched(self) -> None:
        """Start outside of `matched_passes`, where passes are not counted."""
        self._passes_declared: int | None = None
        self._passes_made = 0

    @contextmanager
    def matched_passes(self, passes: int, backward: bool) -> Iterator[None]:
        """Surround `passes` forward (and backward) passes of this rank, and add idle passes at the end, so
        that all ranks that share the base make equally many.

        The number is agreed on before the first pass. Afterwards, the agreement itself would be matched with
        another rank's gather.

        Raises:
            AssertionError: a different number of passes was made; other ranks would wait forever.
        """
        most = self._agree(passes)
        self._passes_declared = None if self._matched_group is None else passes
        self._passes_made = 0
        try:
            yield
            assert self._passes_declared in (None, self._passes_made), self._miscounted()
        finally:
            self._passes_declared = None
        for _ in range(most - passes):
            with self._clock.stage("idle"):
                self._idle_pass(backward)

    def _count_pass(self) -> None:
        """Count a pass that this rank is about to make. Idle passes are not counted.

        Raises:
            AssertionError: it is one more than was declared, and other ranks would not join it.
        """
        self._passes_made += 1
        assert self._passes_declared is None or self._passes_made <= self._passes_declared, self._miscounted()

    def _miscounted(self) -> str:
        return (
            f"{self._passes_declared} passes were declared to the ranks that share the base, and "
            f"{self._passes_made} made: Method.passes (or train_passes and eval_passes of the engine) must "
            "count all of them, reads of masters in a step too"
        )

    def _agree(self, passes: int) -> int:
        """Return the largest number of passes among the matched ranks; `passes` if this rank is
        independent.
        """
        if self._matched_group is None:
            return passes
        most = torch.tensor([float(passes)], device=self._device)
        with self._clock.stage("idle"):
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._matched_group)
        return int(most.item())

    def agree_least(self, value: int) -> int:
        """Return the least value among the ranks that take steps together: the matched ranks, or the
        client's.
        """
        group = self._matched_group or (self.groups.client if self.groups.client_size > 1 else None)
        if group is None:
            return value
        least = torch.tensor([value], device=self._device)
        with self._clock.stage("idle"):
            dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
        return int(least.item())

    @abstractmethod
    def _idle_pass(self, backward: bool) -> None:
        """Make a pass that only takes part in the collectives of other ranks."""
