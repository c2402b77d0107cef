"""What one rank computes of a pass: the blocks of its chunks, and embedding and head of the micro-batches
whose data it holds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_leaves

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
from fedspeed.engine.stage_weights import StageWeights
from fedspeed.models.blocks import Anatomy
from fedspeed.schedule.instructions import Loaded, Stream


@dataclass
class _Graph:
    """A chunk's input and output of one micro-batch, with the graph between them; `addresses`: where the
    blocks' weights were.
    """

    x: torch.Tensor
    y: torch.Tensor
    addresses: list[int]


class Stage:
    """Computes what a `Player` asks for.

    Args:
        model: as built, its trainable parameters inside the blocks; they serve as places that an owner's
            tensors are bound to.
        store: the frozen parameters of this rank.
        chunks: the blocks of each chunk of the whole model; this rank has the weights of some.
        policy: what waits for the way back.
        lowest: the block in which the way back ends.
        compiled: whether blocks are compiled.
    """

    def __init__(
        self,
        model,
        parts: Anatomy,
        store: BaseStore,
        chunks: Sequence[range],
        *,
        policy: ActivationPolicy,
        lowest: int = 0,
        compiled: bool = False,
    ):
        self._model = model
        self._parts = parts
        self._chunks = chunks
        self._policy = policy
        self._lowest = lowest
        self.compute = MicroBatchModel(model, parts, compiled)
        self._loads = StageWeights(model, parts, store, chunks)
        names = {id(p): n for n, p in model.named_parameters()}
        self.places = [
            [(names[id(p)], p) for p in block.parameters() if p.requires_grad] for block in parts.blocks
        ]
        self._clear()

    def _clear(self) -> None:
        """Let go of all that belongs to a pass."""
        self._tasks: Sequence[MicroBatchTask] = ()
        self._owners: Sequence[Tensors] = ()
        self._calls: dict[int, list[Call]] = {}  # of each micro-batch's blocks
        self._bound: dict[int, int] = {}  # block -> the owner whose tensors its places are bound to
        # By chunk and micro-batch: the chunk's graph, or the inputs of its blocks.
        self._kept: dict[int, dict[int, _Graph | list[StoredInput]]] = {}
        self.grads: list[Tensors] = []
        self._scores: dict[int, DeviceScore] = {}
        self._putting: int | None = None  # the chunk whose inputs are put away

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
            tasks: those of other ranks have the shapes of what they hold, and no content.
            owners: this rank's trainable tensors by name, of each owner.
            stream: what this rank will do.
            ahead: whether the pass after this one begins with the same loads, which may run ahead.
        """
        self._clear()
        self._model.train(train)
        self._tasks = tasks
        self._owners = owners
        self._train = train
        self.grads = [{} for _ in owners]
        if train:
            self._policy.begin()
        self._loads.begin(stream, ahead=ahead)

    def load(self, chunk: Loaded) -> None:
        self._loads.load(chunk)

    def release(self, chunk: Loaded) -> None:
        self._loads.release(chunk)

    def abandon(self) -> None:
        """Let go of all that a pass has loaded and kept, after it has failed."""
        self._loads.abandon()
        self._clear()

    def embed(self, micro: int) -> torch.Tensor:
        hidden, self._calls[micro] = self.compute.enter(self._tasks[micro], self._loads.table)
        return hidden

    def decide(self, chunk: int, hidden: dict[int, torch.Tensor]) -> None:
        self._policy.decide(
            hidden, lambda micro: self._measured(micro, self._chunks[chunk][0], hidden[micro])
        )

    def _measured(self, micro: int, block: int, hidden: torch.Tensor) -> float:
        """Bytes that a block's graph keeps for each value of its input, without the input itself."""
        x = hidden.detach().requires_grad_()
        call = self._calls[micro][block]
        self._bind((block,), self._tasks[micro].owner)
        shared = [value for value in tree_leaves((call.args, call.kwargs)) if isinstance(value, torch.Tensor)]
        with (
            SavedBytesCounter([*self._parts.blocks[block].parameters(), *shared, x]) as saved,
            torch.enable_grad(),
        ):
            y = self.compute.block(block, self._tasks[micro], self._calls[micro], x)
        del y
        return saved.nbytes / x.numel()

    def forward(self, micro: int, chunk: int, hidden: torch.Tensor) -> torch.Tensor:
        blocks = self._chunks[chunk]
        x = hidden.detach()
        self._bind(blocks, self._tasks[micro].owner)
        if not self._train or blocks[-1] < self._lowest:
            return self._through(micro, blocks, x)
        if chunk != self._putting:
            self._putting = chunk
            self._policy.begin_block(blocks[0])
        if self._policy.keeps_graph(blocks[0], micro):
            x.requires_grad_(blocks[0] > self._lowest)
            with torch.enable_grad():
                y = self._through(micro, blocks, x, grad=True)
            self._kept.setdefault(chunk, {})[micro] = _Graph(x, y, self._loads.addresses(blocks))
            return y.detach()
        inputs = self._kept.setdefault(chunk, {})[micro] = []
        with torch.no_grad():
            for b in blocks:
                inputs.append(self._policy.put(x, b, micro))
                x = self.compute.block(b, self._tasks[micro], self._calls_of(micro), x)
        return x

    def _through(
        self, micro: int, blocks: Sequence[int], x: torch.Tensor, *, grad: bool = False
    ) -> torch.Tensor:
        """The output of some blocks behind each other."""
        with torch.set_grad_enabled(grad):
            for b in blocks:
                x = self.compute.block(b, self._tasks[micro], self._calls_of(micro), x)
        return x

    def head(self, micro: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """The gradient of scale * loss by `hidden`, while training."""
        task = self._tasks[micro]
        x = hidden.detach()
        with self._loads.head():
            self._scores[micro], flow = self.compute.head(x, task, differentiate=self._train)
        return flow

    def bring(self, chunk: int) -> None:
        kept = self._kept.get(chunk, {}).values()
        self._policy.bring([waiting for own in kept if isinstance(own, list) for waiting in own])

    def backward(self, micro: int, chunk: int, upward: torch.Tensor) -> torch.Tensor | None:
        """The gradient by the chunk's input; None where nothing trains below it."""
        task = self._tasks[micro]
        blocks = self._chunks[chunk]
        kept = self._kept[chunk].pop(micro)
        self._bind(blocks, task.owner)
        if isinstance(kept, _Graph):
            assert kept.addresses == self._loads.addresses(blocks), (
                f"chunk {chunk} has moved since its graph was built"
            )
            return self._differentiate(task, blocks, kept.x, kept.y, upward)
        flow = upward
        for b in reversed(blocks):
            x = kept.pop().take().detach().requires_grad_(b > self._lowest)
            with torch.enable_grad():
                y = self.compute.block(b, task, self._calls_of(micro), x)
            flow = self._differentiate(task, (b,), x, y, flow)
        return flow

    def end(self) -> tuple[dict[int, Score], list[Tensors]]:
        """End the pass: (the scores, as numbers, of the micro-batches whose labels this rank holds; by owner
        the gradients [fp32, by name]).
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
        """Put an owner's trainable tensors into the places of some blocks. A graph finds the tensors that are
        there when it is differentiated, so they are bound anew before that.
        """
        for b in blocks:
            if self._bound.get(b) != owner:
                self._bound[b] = owner
                for name, place in self.places[b]:
                    place.data = self._owners[owner][name].data

    def _differentiate(
        self,
        task: MicroBatchTask,
        blocks: Sequence[int],
        x: torch.Tensor,
        y: torch.Tensor,
        upward: torch.Tensor,
    ) -> torch.Tensor | None:
        """Add the gradients of the blocks' places to their owner's; returns that of their input."""
        places = list(self._places_of(blocks))
        wanted = ([x] if x.requires_grad else []) + [place for _, place in places]
        found = torch.autograd.grad(y, wanted, upward)
        flow, found = (found[0], found[1:]) if x.requires_grad else (None, found)
        into = self.grads[task.owner]
        for (name, _), grad in zip(places, found):
            into[name] = into[name].add_(grad) if name in into else grad.float()
        return flow

    def _places_of(self, blocks: Sequence[int]) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return (named for b in blocks for named in self.places[b])
