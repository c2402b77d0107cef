"""The loss on held-out rows, and how many of their answers greedy decoding reproduces exactly."""

from collections.abc import Mapping

from fedspeed.data.eval_task import LossTask
from fedspeed.data.rows import Row
from fedspeed.evaluation.context import TaskContext
from fedspeed.evaluation.held_out_rows import held_out_digests, held_out_rows


class HeldOutLoss(LossTask):
    """Held-out rows of a run's clients or of a file."""

    name = "held_out"

    def __init__(self, context: TaskContext):
        self._context = context

    def items(self, limit: int = 0) -> list[Row]:
        return held_out_rows(self._context, limit)

    def digests(self) -> Mapping[str, str]:
        return held_out_digests(self._context)


def make(context: TaskContext) -> HeldOutLoss:
    """Make the task."""
    return HeldOutLoss(context)
