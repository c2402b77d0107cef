"""Load and release the frozen weights that one rank's instruction stream uses."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import nn

from fedspeed.engine.base.store import BaseStore
from fedspeed.models.blocks import Anatomy
from fedspeed.schedule.instructions import Head, Instruction, Load, Loaded, Stream
from fedspeed.schedule.loads import loads_of


class StageWeights:
    """Load chunks, embedding and head of one rank.

    Args:
        store: the frozen parameters of this rank.
        chunks: the blocks of each chunk of the whole model; this rank has the weights of some of them.
    """

    def __init__(self, model: nn.Module, parts: Anatomy, store: BaseStore, chunks: Sequence[range]):
        self._parts = parts
        self._store = store
        self._chunks = chunks
        names = {id(p): n for n, p in model.named_parameters()}
        numbers = {tensor.name: i for i, unit in enumerate(store.units) for tensor in unit.tensors}
        # Of each block; None where this rank does not have its weights.
        self._units = [
            next((numbers[names[id(p)]] for p in block.parameters() if names[id(p)] in numbers), None)
            for block in parts.blocks
        ]
        embedding = names[id(parts.embedding.weight)]
        head = names[id(parts.head.weight)]
        self._embedding_unit = numbers.get(embedding)
        self._head_unit = numbers.get(head)
        # The table in which single rows can be read; None: the embedding must be loaded, or is not on this
        # rank.
        self._rows = None if self._embedding_unit is None else store.rows(self._embedding_unit, embedding)
        self._loaded: dict[Loaded, ExitStack] = {}

    @property
    def table(self) -> torch.Tensor:
        """The embedding's weights, on the device or in host memory. If rows cannot be read on the host, the
        embedding must be loaded.
        """
        return self._parts.embedding.weight if self._rows is None else self._rows

    def begin(self, stream: Stream, *, ahead: bool = False) -> None:
        """Announce to the store what a stream will load.

        Args:
            ahead: whether the pass after this one begins with the same loads, so that they can be prefetched.
        """
        loads = loads_of(stream)
        self._stream_loads_head = "head" in loads
        units = [unit for instruction in stream for unit in self._units_used(instruction)]
        if ahead:
            units += [unit for chunk in dict.fromkeys(loads) for unit in self._units_of(chunk)]
        self._store.begin(units)

    def _units_used(self, instruction: Instruction) -> list[int]:
        """Return the units that an instruction uses in the store."""
        if isinstance(instruction, Load):
            return self._units_of(instruction.chunk)
        if isinstance(instruction, Head) and not self._stream_loads_head:
            return self._units_of("head")
        return []

    def _units_of(self, chunk: Loaded) -> list[int]:
        if chunk == "embedding":
            units = [self._embedding_unit if self._rows is None else None]
        elif chunk == "head":
            units = [self._head_unit]
        else:
            units = [self._units[b] for b in self._chunks[chunk]]
        return [unit for unit in units if unit is not None]

    def load(self, chunk: Loaded) -> None:
        """Load the weights of a chunk onto the device."""
        stack = ExitStack()
        self._loaded[chunk] = stack
        for unit in self._units_of(chunk):
            stack.enter_context(self._store.use(unit))

    def release(self, chunk: Loaded) -> None:
        """Release the weights of a chunk."""
        self._loaded.pop(chunk).close()

    def head(self) -> AbstractContextManager[None]:
        """Load the head's weights for the code inside, unless the stream loads them by an instruction."""
        if self._stream_loads_head:
            return nullcontext()
        assert self._head_unit is not None, "this rank has no head"
        return self._store.use(self._head_unit)

    def abandon(self) -> None:
        """Release all weights after a pass that has failed."""
        while self._loaded:
            self._loaded.popitem()[1].close()

    def addresses(self, blocks: Iterable[int]) -> list[int]:
        """Return the device addresses of loaded blocks' weights (`BaseStore.address`)."""
        units = [self._units[b] for b in blocks]
        return [self._store.address(unit) for unit in units if unit is not None]
