"""The frozen weights that one rank's instruction stream uses: announced to the store, loaded, and let go."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext

import torch

from fedspeed.engine.base.store import BaseStore
from fedspeed.models.blocks import Anatomy
from fedspeed.schedule.instructions import Head, Load, Loaded, Stream
from fedspeed.schedule.loads import loads_of


class StageWeights:
    """Loads chunks, embedding and head of one rank.

    Args:
        store: the frozen parameters of this rank.
        chunks: the blocks of each chunk of the whole model; this rank has the weights of some.
    """

    def __init__(self, model: torch.nn.Module, parts: Anatomy, store: BaseStore, chunks: Sequence[range]):
        self._parts = parts
        self._store = store
        self._chunks = chunks
        names = {id(p): n for n, p in model.named_parameters()}
        numbers = {piece.name: i for i, unit in enumerate(store.units) for piece in unit.pieces}
        self._units = [
            next((numbers[names[id(p)]] for p in block.parameters() if names[id(p)] in numbers), None)
            for block in parts.blocks
        ]
        embedding = names[id(parts.embedding.weight)]
        head = names[id(parts.head.weight)]
        self._embedding_unit, self._head_unit = numbers.get(embedding), numbers.get(head)
        # Where single rows can be looked up; None: the embedding must be loaded, or is not here.
        self._rows = None if self._embedding_unit is None else store.rows(self._embedding_unit, embedding)
        self._loaded: dict[Loaded, ExitStack] = {}

    @property
    def table(self) -> torch.Tensor:
        """The embedding's weights, wherever they lie; while it is loaded, where it must be."""
        return self._parts.embedding.weight if self._rows is None else self._rows

    def begin(self, stream: Stream, *, ahead: bool = False) -> None:
        """Announce what a stream will load.

        Args:
            ahead: whether the pass after this one begins with the same loads, which may run ahead.
        """
        loads = loads_of(stream)
        self._holds_head = "head" in loads
        units = [unit for work in stream for unit in self._needed(work)]
        if ahead:
            units += [unit for chunk in dict.fromkeys(loads) for unit in self._units_of(chunk)]
        self._store.begin(units)

    def _needed(self, work) -> list[int]:
        """The units that an instruction uses of those that are loaded."""
        if isinstance(work, Load):
            return self._units_of(work.chunk)
        if isinstance(work, Head) and not self._holds_head:
            return self._units_of("head")
        return []

    def _units_of(self, chunk: Loaded) -> list[int]:
        if chunk == "embedding":
            found = [self._embedding_unit if self._rows is None else None]
        elif chunk == "head":
            found = [self._head_unit]
        else:
            found = [self._units[b] for b in self._chunks[chunk]]
        return [unit for unit in found if unit is not None]

    def load(self, chunk: Loaded) -> None:
        """Hold the weights of a chunk on the device."""
        stack = self._loaded[chunk] = ExitStack()
        for unit in self._units_of(chunk):
            stack.enter_context(self._store.use(unit))

    def release(self, chunk: Loaded) -> None:
        """Let the weights of a chunk go."""
        self._loaded.pop(chunk).close()

    def head(self):
        """Hold the head's weights on the device inside, where the stream does not load them itself."""
        return nullcontext() if self._holds_head else self._store.use(self._head_unit)

    def abandon(self) -> None:
        """Let go of all that is loaded, after a pass that has failed."""
        while self._loaded:
            self._loaded.popitem()[1].close()

    def addresses(self, blocks: Iterable[int]) -> list[int]:
        """Tell where the weights of blocks are that are loaded (`BaseStore.address`)."""
        return [self._store.address(self._units[b]) for b in blocks]
