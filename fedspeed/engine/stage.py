"""The computation of one rank in a pass: the blocks of its chunks, and embedding and head of the
micro-batches whose data it has.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from fedspeed.engine.activation_policy import ActivationPolicy
from fedspeed.engine.activations import SavedBytesCounter
from fedspeed.engine.base.store import BaseStore
from fedspeed.engine.block_inputs import StoredInput
from fedspeed.engine.compute.micro_batches import (
    Call,
    DeviceScore,
    MicroBatchModel,
    MicroBatchTask,
    Score,
    Tensors,
    fetch_scores,
)
from fedspeed.engine.instruction_executor import StageCompute
from fedspeed.engine.stage_weights import StageWeights
from fedspeed.models.blocks import Anatomy
from fedspeed.schedule.instructions import Loaded, Stream


@dataclass
class _Graph:
    """Input and output of a chunk for one micro-batch, connected by an autograd graph.

    Attributes:
        addresses: of the blocks' weights on the device when the graph was built.
    """

    x: torch.Tensor
    y: torch.Tensor
    addresses: list[int]


class Stage(StageCompute):
    """Compute micro-batches as an `InstructionExecutor` asks for.

    Args:
        model: as built, with its trainable parameters inside the blocks. A client's tensors are bound to
            these parameters while its micro-batches are computed.
        store: the frozen parameters of this rank.
        chunks: the blocks of each chunk of the whole model; this rank has the weights of some of them.
        policy: decides what is kept for the backward pass.
        lowest: the block in which the backward pass ends.
        compiled: whether blocks are compiled.

    Attributes:
        trainable: by block, (name, parameter) of its trainable parameters.
        grads: by client slot, the gradients [fp32] by name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parts: Anatomy,
        store: BaseStore,
        chunks: Sequence[range],
        *,
        policy: ActivationPolicy,
        lowest: int = 0,
        compiled: bool = False,
        logits_mib: int | str = "auto",
    ):
        self._model = model
        self._parts = parts
        self._chunks = chunks
        self._policy = policy
        self._lowest = lowest
        self.compute = MicroBatchModel(model, parts, compiled, logits_mib)
        self._weights = StageWeights(model, parts, store, chunks)
        names = {id(p): n for n, p in model.named_parameters()}
        self.trainable = [
            [(names[id(p)], p) for p in block.parameters() if p.requires_grad] for block in parts.blocks
        ]
        self._clear()

    def _clear(self) -> None:
        """Release everything that belongs to a pass."""
        self._tasks: Sequence[MicroBatchTask] = ()
        self._owners: Sequence[Tensors] = ()
        self._calls: dict[int, list[Call]] = {}  # by micro-batch, how its blocks are called
        self._bound: dict[int, int] = {}  # block -> the client whose tensors are bound to its parameters
        # By chunk and micro-batch: the chunk's graph, or the inputs of its blocks.
        self._kept: dict[int, dict[int, _Graph | list[StoredInput]]] = {}
        self.grads: list[Tensors] = []
        self._scores: dict[int, DeviceScore] = {}
        self._storing: int | None = None  # the chunk whose inputs are stored at the moment

    def begin(
        self,
        tasks: Sequence[MicroBatchTask],
        owners: Sequence[Tensors],
        stream: Stream,
        *,
        train: bool,
        ahead: bool = False,
    ) -> None:
        """Begin a pass over some micro-batches.

        Args:
            tasks: those of other ranks have the right shapes, and no content.
            owners: this rank's trainable tensors by name, for each client.
            stream: this rank's instructions.
            ahead: whether the pass after this one begins with the same loads, so that they can be prefetched.
        """
        self._clear()
        self._model.train(train)
        self._tasks = tasks
        self._owners = owners
        self._train = train
        self.grads = [{} for _ in owners]
        if train:
            self._policy.begin()
        self._weights.begin(stream, ahead=ahead)

    def load(self, chunk: Loaded) -> None:
        self._weights.load(chunk)

    def release(self, chunk: Loaded) -> None:
        self._weights.release(chunk)

    def abandon(self) -> None:
        self._weights.abandon()
        self._clear()

    def embed(self, micro: int) -> torch.Tensor:
        hidden, self._calls[micro] = self.compute.enter(self._tasks[micro], self._weights.table)
        return hidden

    def decide(self, chunk: int, hidden: dict[int, torch.Tensor]) -> None:
        block = self._chunks[chunk][0]
        self._policy.decide(hidden, lambda micro: self._measured(micro, block, hidden[micro]))

    def _measured(self, micro: int, block: int, hidden: torch.Tensor) -> float:
        """Return the bytes that a block's graph saves for each value of its input, without the input
        itself.
        """
        x = hidden.detach().requires_grad_()
        call = self._calls[micro][block]
        self._bind((block,), self._tasks[micro].owner)
        shared = [value for value in tree_leaves((call.args, call.kwargs)) if isinstance(value, torch.Tensor)]
        excluded = [*self._parts.blocks[block].parameters(), *shared, x]
        saved = SavedBytesCounter(excluded)
        with saved, torch.enable_grad():
            y = self.compute.block(block, self._tasks[micro], self._calls[micro], x)
        del y
        return saved.nbytes / x.numel()

    def forward(self, micro: int, chunk: int, hidden: torch.Tensor) -> torch.Tensor:
        blocks = self._chunks[chunk]
        x = hidden.detach()
        self._bind(blocks, self._tasks[micro].owner)
        if not self._train or blocks[-1] < self._lowest:
            return self._through(micro, blocks, x)
        if chunk != self._storing:
            self._storing = chunk
            self._policy.begin_block(blocks[0])
        if self._policy.keeps_graph(blocks[0], micro):
            x.requires_grad_(blocks[0] > self._lowest)
            with torch.enable_grad():
                y = self._through(micro, blocks, x, grad=True)
            graph = _Graph(x, y, self._weights.addresses(blocks))
            self._kept.setdefault(chunk, {})[micro] = graph
            return y.detach()
        inputs: list[StoredInput] = []
        self._kept.setdefault(chunk, {})[micro] = inputs
        with torch.no_grad():
            for b in blocks:
                inputs.append(self._policy.put(x, b, micro))
                x = self.compute.block(b, self._tasks[micro], self._calls_of(micro), x)
        return x

    def _through(
        self, micro: int, blocks: Sequence[int], x: torch.Tensor, *, grad: bool = False
    ) -> torch.Tensor:
        """Return the output of some blocks, one after the other."""
        with torch.set_grad_enabled(grad):
            for b in blocks:
                x = self.compute.block(b, self._tasks[micro], self._calls_of(micro), x)
        return x

    def head(self, micro: int, hidden: torch.Tensor) -> torch.Tensor | None:
        task = self._tasks[micro]
        x = hidden.detach()
        with self._weights.head():
            self._scores[micro], grad = self.compute.head(x, task, differentiate=self._train)
        return grad

    def prefetch(self, chunk: int) -> None:
        kept = self._kept.get(chunk, {}).values()
        self._policy.prefetch([stored for inputs in kept if isinstance(inputs, list) for stored in inputs])

    def backward(self, micro: int, chunk: int, output_grad: torch.Tensor) -> torch.Tensor | None:
        task = self._tasks[micro]
        blocks = self._chunks[chunk]
        kept = self._kept[chunk].pop(micro)
        self._bind(blocks, task.owner)
        if isinstance(kept, _Graph):
            assert kept.addresses == self._weights.addresses(blocks), (
                f"the weights of chunk {chunk} are at another address than when its graph was built"
            )
            return self._differentiate(task, blocks, kept.x, kept.y, output_grad)
        grad: torch.Tensor | None = output_grad
        for b in reversed(blocks):
            assert grad is not None, "the backward pass has ended in a block above"
            x = kept.pop().take().detach().requires_grad_(b > self._lowest)
            with torch.enable_grad():
                y = self.compute.block(b, task, self._calls_of(micro), x)
            grad = self._differentiate(task, (b,), x, y, grad)
        return grad

    def end(self) -> tuple[dict[int, Score], list[Tensors]]:
        """End the pass.

        Returns:
            (the scores of the micro-batches whose labels this rank has, by number; by client slot the
            gradients [fp32] by name).
        """
        fetched = fetch_scores(list(self._scores.values()), [self._tasks[micro] for micro in self._scores])
        scores = dict(zip(self._scores, fetched, strict=True))
        grads = self.grads
        if self._train:
            self._policy.end()
        self._clear()
        return scores, grads

    def _calls_of(self, micro: int) -> list[Call]:
        if micro not in self._calls:
            _, self._calls[micro] = self.compute.enter(self._tasks[micro], None)
        return self._calls[micro]

    def _bind(self, blocks: Sequence[int], owner: int) -> None:
        """Bind a client's trainable tensors to the parameters of some blocks. An autograd graph uses the
        tensors that are bound when the gradient is computed, so they are bound again before that.
        """
        for b in blocks:
            if self._bound.get(b) != owner:
                self._bound[b] = owner
                for name, parameter in self.trainable[b]:
                    parameter.data = self._owners[owner][name].data

    def _differentiate(
        self,
        task: MicroBatchTask,
        blocks: Sequence[int],
        x: torch.Tensor,
        y: torch.Tensor,
        output_grad: torch.Tensor,
    ) -> torch.Tensor | None:
        """Add the gradients of the blocks' trainable parameters to their client's; returns the gradient by
        the blocks' input, if it is needed.
        """
        named = list(self._trainable_in(blocks))
        inputs = ([x] if x.requires_grad else []) + [parameter for _, parameter in named]
        grads = torch.autograd.grad(y, inputs, output_grad)
        input_grad, grads = (grads[0], grads[1:]) if x.requires_grad else (None, grads)
        sums = self.grads[task.owner]
        for (name, _), grad in zip(named, grads):
            sums[name] = sums[name].add_(grad) if name in sums else grad.float()
        return input_grad

    def _trainable_in(self, blocks: Sequence[int]) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return (named for b in blocks for named in self.trainable[b])
