"""What of a pass waits for its way back: graphs with the activations that they save, or the inputs of blocks,
on the device or on the host.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from fedspeed.engine.activations import ActivationBudget
from fedspeed.engine.block_inputs import BlockInputs, StoredInput
from fedspeed.schedule.kept import kept_counts


class ActivationPolicy(Protocol):
    """Decides what waits, and looks after what does. Blocks and micro-batches go by their numbers."""

    def begin(self) -> None:
        """Begin a pass with a way back."""

    def begin_block(self, block: int) -> None:
        """Begin to put away the inputs of a block."""

    def keeps_graph(self, block: int, micro: int) -> bool:
        """Tell whether a block keeps its graph of a micro-batch; else its input is `put`, and it is computed
        again.
        """

    def put(self, hidden: torch.Tensor, block: int, micro: int) -> StoredInput:
        """Put a block's input away."""

    def bring(self, inputs: Sequence[StoredInput]) -> None:
        """Begin to bring a block's inputs back."""

    def end(self) -> None:
        """End the pass."""


class FixedActivationPolicy:
    """Keep every graph, or every input on the device. The stages of a pipeline do."""

    def __init__(self, graphs: bool):
        self._graphs = graphs

    def begin(self) -> None:
        """Nothing is decided anew."""

    def begin_block(self, block: int) -> None:
        """Nothing travels."""

    def keeps_graph(self, block: int, micro: int) -> bool:
        return self._graphs

    def put(self, hidden: torch.Tensor, block: int, micro: int) -> StoredInput:
        return StoredInput(None, hidden)

    def bring(self, inputs: Sequence[StoredInput]) -> None:
        """Nothing is away."""

    def end(self) -> None:
        """Nothing is learnt."""


@dataclass(frozen=True)
class KeptCounts:
    """What of a step stays on the device until its backward pass: of each block, of how many micro-batches
    (the first ones) all activations, and of how many at least the input.
    """

    activations: Sequence[int]
    inputs: Sequence[int]


class BudgetedActivationPolicy:
    """Keep on the device what a budget allows; the last block's graphs always, whose backward follows its
    forward.

    Args:
        budget: for activations that are not computed again.
        inputs: where the inputs of blocks wait; auto: on the device as far as the budget allows.
        blocks: of the model. lowest: the first one in which something trains.
    """

    def __init__(
        self, budget: ActivationBudget, inputs: Literal["auto", "device", "host"], *, blocks: int, lowest: int
    ):
        self.budget, self.inputs = budget, BlockInputs()
        self._place_of_inputs = inputs
        self._blocks = blocks
        self._lowest = lowest
        self._kept = self._none()
        self._measured_input = 0  # bytes of the largest input in a step whose activations were measured
        self._saved_per_value = (
            0.0  # bytes that a block's graph saves for each value of its input, the most that was seen
        )

    def _none(self) -> KeptCounts:
        return KeptCounts([0] * self._blocks, [0] * self._blocks)

    def begin(self) -> None:
        self._kept = self._none()

    def decide(self, hidden: Mapping[int, torch.Tensor], measure: Callable[[int], float]) -> None:
        """Keep as much of this pass as fits into the budget: first inputs of blocks (auto), then activations,
        the last blocks' first.

        Args:
            hidden: by micro-batch, what enters the lowest block that trains: all blocks' inputs are alike.
            measure: tells how many bytes that block's graph saves of a micro-batch, for each value of its
                input.
        """
        if not hidden:
            return
        sizes = [hidden[micro].nbytes for micro in sorted(hidden)]
        budget = self.budget.begin(sizes)
        if self._place_of_inputs == "auto":
            stay = kept_counts(budget, sizes, self._blocks, self._lowest)
            budget -= sum(sum(sizes[:count]) for count in stay)
        else:
            stay = [len(sizes) if self._place_of_inputs == "device" else 0] * self._blocks
        self._kept = KeptCounts([0] * self._blocks, stay)
        if budget < max(sizes):  # activations take more than an input
            return
        if max(sizes) > self._measured_input:
            self._measured_input = max(sizes)
            longest = max(sorted(hidden), key=lambda micro: hidden[micro].shape[1])
            self._saved_per_value = max(self._saved_per_value, measure(longest))
        # An input that would wait on the host stays on the device beside the activations that are kept.
        beside = [0 if self._place_of_inputs != "host" else size for size in sizes]
        values = [hidden[micro].numel() for micro in sorted(hidden)]
        saved = [int(self._saved_per_value * count) + size for count, size in zip(values, beside)]
        self._kept = KeptCounts(kept_counts(budget, saved, self._blocks, self._lowest), stay)

    def begin_block(self, block: int) -> None:
        if block < self._blocks - 1:
            self.inputs.begin_block()

    def keeps_graph(self, block: int, micro: int) -> bool:
        return block == self._blocks - 1 or micro < self._kept.activations[block]

    def put(self, hidden: torch.Tensor, block: int, micro: int) -> StoredInput:
        return self.inputs.put(hidden, on_host=micro >= self._kept.inputs[block])

    def bring(self, inputs: Sequence[StoredInput]) -> None:
        self.inputs.turn()  # the way back has begun
        self.inputs.bring(inputs)

    def end(self) -> None:
        self.inputs.turn()
        self.budget.step_done()
