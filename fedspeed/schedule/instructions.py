"""What a rank of a pipeline does, one thing after the other: an instruction stream. Pure values, which the
engine and the simulator execute alike.

A model is cut into chunks of consecutive blocks. A micro-batch is embedded by one rank, passes the chunks in
order, gets its loss and the loss's gradient from the rank that holds its labels, and passes the chunks again
backwards:

    activation 0: embedding -> chunk 0;  activation k: chunk k-1 -> chunk k;  activation K: chunk K-1 -> head
    gradient K-1: head -> chunk K-1;     gradient k: chunk k+1 -> chunk k
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["activation", "gradient"]
Loaded = int | Literal["embedding", "head"]  # a chunk, or an end of the model


@dataclass(frozen=True)
class Micro:
    """A micro-batch: whose it is, and which ranks embed it and hold its labels."""

    client: int
    embed: int
    head: int


@dataclass(frozen=True)
class Pipeline:
    """`chunks`: the rank that holds each chunk, in the model's order. `ranks`: their number; ranks may hold
    several chunks, or none.
    """

    ranks: int
    chunks: tuple[int, ...]
    micros: tuple[Micro, ...]

    def sender(self, micro: int, kind: Kind, hop: int) -> int:
        if kind == "activation":
            return self.micros[micro].embed if hop == 0 else self.chunks[hop - 1]
        return self.micros[micro].head if hop == len(self.chunks) - 1 else self.chunks[hop + 1]

    def receiver(self, micro: int, kind: Kind, hop: int) -> int:
        return (
            self.micros[micro].head if kind == "activation" and hop == len(self.chunks) else self.chunks[hop]
        )


@dataclass(frozen=True)
class Instruction:
    @property
    def kwargs(self) -> dict:
        """Arguments of the method that executes it, as DeepSpeed's own instructions give them."""
        return dict(vars(self))

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in self.kwargs.items())})"


@dataclass(frozen=True)
class Embed(Instruction):
    micro: int


@dataclass(frozen=True)
class Forward(Instruction):
    micro: int
    chunk: int


@dataclass(frozen=True)
class Head(Instruction):
    """Loss, and its gradient by what the last chunk gave."""

    micro: int


@dataclass(frozen=True)
class Backward(Instruction):
    micro: int
    chunk: int


@dataclass(frozen=True)
class Load(Instruction):
    """Wait until the chunk's weights are on the device; they are fetched ahead in the order of the stream's
    loads.
    """

    chunk: Loaded


@dataclass(frozen=True)
class Release(Instruction):
    chunk: Loaded


@dataclass(frozen=True)
class Decide(Instruction):
    """Decide what of the pass stays on the device until its way back, of this chunk and of those behind
    it.
    """

    chunk: int


@dataclass(frozen=True)
class Bring(Instruction):
    """Begin to bring onto the device what a chunk's way back starts from; nobody waits for its end."""

    chunk: int


@dataclass(frozen=True)
class Send(Instruction):
    """Begin to send; nobody waits for its end."""

    micro: int
    kind: Kind
    hop: int
    to: int


@dataclass(frozen=True)
class Receive(Instruction):
    """Wait for what another rank has sent."""

    micro: int
    kind: Kind
    hop: int
    source: int


@dataclass(frozen=True)
class Step(Instruction):
    """The optimizer step of a client, on this rank's part of its adapter."""

    client: int


Stream = tuple[Instruction, ...]


def with_transfers(
    pipeline: Pipeline, computed: Sequence[Sequence[Instruction]], train: bool = True
) -> tuple[Stream, ...]:
    """Put a Receive before whatever needs another rank's result, a Send behind whatever another rank needs,
    and the clients' Steps at the end: in the same order on all ranks, since a norm or an overflow is found
    out together.

    Args:
        computed: by rank, everything but transfers and steps. train: whether there is a way back.
    """
    return tuple(tuple(_woven(pipeline, rank, order, train)) for rank, order in enumerate(computed))


def _woven(pipeline: Pipeline, rank: int, order: Sequence[Instruction], train: bool):
    for work in order:
        for kind, hop in needs(pipeline, work):
            source = pipeline.sender(work.micro, kind, hop)
            if source != rank:
                yield Receive(work.micro, kind, hop, source)
        yield work
        for kind, hop in gives(pipeline, work):
            to = pipeline.receiver(work.micro, kind, hop)
            if to != rank and (train or kind == "activation"):
                yield Send(work.micro, kind, hop, to)
    if train:
        yield from (Step(client) for client in sorted({micro.client for micro in pipeline.micros}))


def needs(pipeline: Pipeline, work: Instruction) -> list[tuple[Kind, int]]:
    """The (kind, hop) of what a computation starts from."""
    if isinstance(work, Forward):
        return [("activation", work.chunk)]
    if isinstance(work, Head):
        return [("activation", len(pipeline.chunks))]
    return [("gradient", work.chunk)] if isinstance(work, Backward) else []


def gives(pipeline: Pipeline, work: Instruction) -> list[tuple[Kind, int]]:
    """The (kind, hop) of what a computation makes. Nothing is trained below the first chunk, so its gradient
    goes nowhere.
    """
    if isinstance(work, Embed):
        return [("activation", 0)]
    if isinstance(work, Forward):
        return [("activation", work.chunk + 1)]
    if isinstance(work, Head):
        return [("gradient", len(pipeline.chunks) - 1)]
    return [("gradient", work.chunk - 1)] if isinstance(work, Backward) and work.chunk else []
