"""Decide what a forward pass keeps for the backward pass: autograd graphs with the activations that they
save, or only the inputs of blocks, on the device or on the host.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from fedspeed.engine.activations import ActivationBudget
from fedspeed.engine.block_inputs import BlockInputs, StoredInput
from fedspeed.schedule.kept_activations import kept_counts


class ActivationPolicy(Protocol):
    """Decide what a pass keeps, and store block inputs. Blocks and micro-batches are given by their
    numbers.
    """

    def begin(self) -> None:
        """Begin a pass with a backward pass."""

    def decide(self, hidden: Mapping[int, torch.Tensor], measure: Callable[[int], float]) -> None:
        """Decide how much of this pass is kept (the instruction `Decide`).

        Args:
            hidden: by micro-batch, the input of the lowest block that trains; all blocks' inputs have this
                shape.
            measure: returns how many bytes that block's graph saves of a micro-batch, for each value of its
                input.
        """

    def begin_block(self, block: int) -> None:
        """Begin to store the inputs of a block."""

    def keeps_graph(self, block: int, micro: int) -> bool:
        """Tell whether a block keeps its graph of a micro-batch. Otherwise its input is stored by `put`, and
        the backward pass computes the block again.
        """

    def put(self, hidden: torch.Tensor, block: int, micro: int) -> StoredInput:
        """Store a block's input."""

    def prefetch(self, inputs: Sequence[StoredInput]) -> None:
        """Start to copy a block's inputs back to the device."""

    def end(self) -> None:
        """End the pass."""


class FixedActivationPolicy:
    """Keep every graph, or every input on the device. Used by the stages of a pipeline."""

    def __init__(self, graphs: bool):
        self._graphs = graphs

    def begin(self) -> None:
        """Begin a pass; does nothing."""

    def decide(self, hidden: Mapping[int, torch.Tensor], measure: Callable[[int], float]) -> None:
        """Decide how much is kept: there is nothing to decide."""

    def begin_block(self, block: int) -> None:
        """Begin to store the inputs of a block; does nothing."""

    def keeps_graph(self, block: int, micro: int) -> bool:
        """Tell whether a block keeps its graph."""
        return self._graphs

    def put(self, hidden: torch.Tensor, block: int, micro: int) -> StoredInput:
        """Store a block's input on the device."""
        return StoredInput(None, hidden)

    def prefetch(self, inputs: Sequence[StoredInput]) -> None:
        """Copy inputs back to the device, where all of them are already."""

    def end(self) -> None:
        """End a pass; does nothing."""


@dataclass(frozen=True)
class KeptCounts:
    """Say what stays on the device until the backward pass: for each block, of how many micro-batches (the
    first ones) all activations, and of how many at least the input.
    """

    activations: Sequence[int]
    inputs: Sequence[int]


class BudgetedActivationPolicy:
    """Keep on the device as much as a budget allows. The graphs of the last block are always kept, since its
    backward pass follows its forward pass immediately.

    Args:
        budget: for activations that are kept.
        inputs: where block inputs are stored; auto: on the device as far as the budget allows.
        blocks: number of the model's blocks.
        lowest: the first block in which something trains.

    Attributes:
        inputs: stores block inputs.
    """

    def __init__(
        self, budget: ActivationBudget, inputs: Literal["auto", "device", "host"], *, blocks: int, lowest: int
    ):
        self.budget = budget
        self.inputs = BlockInputs()
        self._inputs_stored = inputs
        self._blocks = blocks
        self._lowest = lowest
        self._kept = self._nothing()
        self._measured_input = 0  # bytes of the largest input in a step whose activations were measured
        self._saved_per_value = 0.0  # the most bytes that a block's graph has saved per value of its input

    def _nothing(self) -> KeptCounts:
        return KeptCounts([0] * self._blocks, [0] * self._blocks)

    def begin(self) -> None:
        """Begin a pass; nothing is kept before `decide`."""
        self._kept = self._nothing()

    def decide(self, hidden: Mapping[int, torch.Tensor], measure: Callable[[int], float]) -> None:
        """Keep as much as fits into the budget: first block inputs (auto), then activations, those of the
        last blocks first. Arguments as in `ActivationPolicy.decide`.
        """
        if not hidden:
            return
        sizes = [hidden[micro].nbytes for micro in sorted(hidden)]
        budget = self.budget.begin(sizes)
        if self._inputs_stored == "auto":
            inputs = kept_counts(budget, sizes, self._blocks, self._lowest)
            budget -= sum(sum(sizes[:count]) for count in inputs)
        else:
            inputs = [len(sizes) if self._inputs_stored == "device" else 0] * self._blocks
        self._kept = KeptCounts([0] * self._blocks, inputs)
        if budget < max(sizes):  # activations take more than an input
            return
        if max(sizes) > self._measured_input:
            self._measured_input = max(sizes)
            longest = max(sorted(hidden), key=lambda micro: hidden[micro].shape[1])
            self._saved_per_value = max(self._saved_per_value, measure(longest))
        # A block whose activations are kept also keeps its input on the device, which `host` would not count.
        inputs_added = [0 if self._inputs_stored != "host" else size for size in sizes]
        values = [hidden[micro].numel() for micro in sorted(hidden)]
        saved = [int(self._saved_per_value * count) + size for count, size in zip(values, inputs_added)]
        self._kept = KeptCounts(kept_counts(budget, saved, self._blocks, self._lowest), inputs)

    def begin_block(self, block: int) -> None:
        """Begin to store the inputs of a block."""
        if block < self._blocks - 1:
            self.inputs.begin_block()

    def keeps_graph(self, block: int, micro: int) -> bool:
        """Tell whether a block keeps its graph of a micro-batch."""
        return block == self._blocks - 1 or micro < self._kept.activations[block]

    def put(self, hidden: torch.Tensor, block: int, micro: int) -> StoredInput:
        """Store a block's input, on the host if there is no room for it on the device."""
        return self.inputs.put(hidden, on_host=micro >= self._kept.inputs[block])

    def prefetch(self, inputs: Sequence[StoredInput]) -> None:
        """Start to copy a block's inputs back to the device."""
        self.inputs.end_forward()  # the backward pass has begun
        self.inputs.prefetch(inputs)

    def end(self) -> None:
        """End the pass and update the budget."""
        self.inputs.end_forward()
        self.budget.step_done()
