"""How a rank keeps step with those that share its base.

Where ranks gather weights from each other, every pass is a matched collective: all of them must make the same
number of passes. `matched_passes` finds that number and fills up to it with passes that train nothing.
"""

from abc import ABC, abstractmethod
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import comm as dist

from fedspeed.engine.groups import Groups


class MatchedPasses(ABC):
    """The part of a `ClientEngine` that keeps step.

    Attributes:
        groups: process groups of this rank.
    """

    groups: Groups
    _matched_group: (
        Any  # group of the ranks that must make the same passes; None where every rank may go on alone
    )
    _device: torch.device
    _clock: Any

    def _begin_alone(self) -> None:
        """Begin outside of any `matched_passes`, where nobody waits for a pass."""
        self._passes_declared: int | None = None
        self._passes_made = 0

    @contextmanager
    def matched_passes(self, passes: int, backward: bool):
        """Surround the `passes` forward (and backward) passes this rank is about to make; ends level with the
        rest of the cluster.

        The number is agreed on before the first pass: afterwards the agreement itself would meet another
        rank's gather.

        Raises:
            AssertionError: where others keep step, other passes were made than these: they would wait for
                each other forever.
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
        """The largest number of passes of any rank that must keep step with this one; `passes` where none
        does.
        """
        if self._matched_group is None:
            return passes
        word = torch.tensor([float(passes)], device=self._device)
        with self._clock.stage("idle"):
            dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self._matched_group)
        return int(word.item())

    def agree_least(self, value: int) -> int:
        """The least value of the ranks that take steps together: a client's, or all that must keep step."""
        group = self._matched_group or (self.groups.client if self.groups.client_size > 1 else None)
        if group is None:
            return value
        word = torch.tensor([value], device=self._device)
        with self._clock.stage("idle"):
            dist.all_reduce(word, op=dist.ReduceOp.MIN, group=group)
        return int(word.item())

    @abstractmethod
    def _idle_pass(self, backward: bool) -> None:
        """A pass that only answers the cluster's collectives."""
