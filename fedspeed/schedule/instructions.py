"""Instruction streams: what a rank computes, loads, sends and receives in a step, in this order. Pure values,
which both the engine and the simulator execute.

A model is cut into chunks of consecutive blocks. A micro-batch is embedded by one rank, passes the chunks in
order, gets its loss and the gradient of the loss from the rank that has its labels, and passes the chunks
again backwards. Activations and gradients are numbered by the hop that they make:

    activation 0: embedding -> chunk 0;  activation k: chunk k-1 -> chunk k;  activation K: chunk K-1 -> head
    gradient K-1: head -> chunk K-1;     gradient k: chunk k+1 -> chunk k
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["activation", "gradient"]
Loaded = int | Literal["embedding", "head"]  # what is loaded: a chunk, the embedding or the head


@dataclass(frozen=True)
class Micro:
    """A micro-batch: its client, the rank that embeds it and the rank that has its labels."""

    client: int
    embed: int
    head: int


@dataclass(frozen=True)
class Pipeline:
    """The assignment of chunks and micro-batches to ranks.

    Attributes:
        ranks: their number; a rank may have several chunks, or none.
        chunks: the rank of each chunk, in the model's order.
    """

    ranks: int
    chunks: tuple[int, ...]
    micros: tuple[Micro, ...]

    def sender(self, micro: int, kind: Kind, hop: int) -> int:
        """Return the rank that computes an activation or a gradient."""
        if kind == "activation":
            return self.micros[micro].embed if hop == 0 else self.chunks[hop - 1]
        return self.micros[micro].head if hop == len(self.chunks) - 1 else self.chunks[hop + 1]

    def receiver(self, micro: int, kind: Kind, hop: int) -> int:
        """Return the rank that needs an activation or a gradient."""
        if kind == "activation" and hop == len(self.chunks):
            return self.micros[micro].head
        return self.chunks[hop]


@dataclass(frozen=True)
class Instruction:
    """One entry of a stream."""

    @property
    def kwargs(self) -> dict[str, Any]:
        """Return the arguments of the method that executes it, as DeepSpeed's own instructions do."""
        return dict(vars(self))

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in self.kwargs.items())})"


@dataclass(frozen=True)
class MicroBatchInstruction(Instruction):
    """An instruction for one micro-batch."""

    micro: int


@dataclass(frozen=True)
class Embed(MicroBatchInstruction):
    """Compute the embedding of a micro-batch."""


@dataclass(frozen=True)
class Forward(MicroBatchInstruction):
    """Compute a chunk's forward pass."""

    chunk: int


@dataclass(frozen=True)
class Head(MicroBatchInstruction):
    """Compute head and loss, and the gradient of the loss by the output of the last chunk."""


@dataclass(frozen=True)
class Backward(MicroBatchInstruction):
    """Compute a chunk's backward pass."""

    chunk: int


@dataclass(frozen=True)
class Load(Instruction):
    """Wait until weights are on the device. They are prefetched in the order of the stream's loads."""

    chunk: Loaded


@dataclass(frozen=True)
class Release(Instruction):
    """Free the device memory of loaded weights."""

    chunk: Loaded


@dataclass(frozen=True)
class Decide(Instruction):
    """Decide which activations of this chunk and the following ones stay on the device until the backward
    pass.
    """

    chunk: int


@dataclass(frozen=True)
class PrefetchInputs(Instruction):
    """Start to prefetch the inputs of a chunk's backward pass onto the device, without waiting for them."""

    chunk: int


@dataclass(frozen=True)
class Send(MicroBatchInstruction):
    """Start to send an activation or a gradient, without waiting until it has arrived."""

    kind: Kind
    hop: int
    to: int


@dataclass(frozen=True)
class Receive(MicroBatchInstruction):
    """Wait for an activation or a gradient of another rank."""

    kind: Kind
    hop: int
    source: int


@dataclass(frozen=True)
class Step(Instruction):
    """Take a client's optimizer step on this rank's part of its adapter."""

    client: int


Stream = tuple[Instruction, ...]


def with_transfers(
    pipeline: Pipeline, computed: Sequence[Sequence[Instruction]], train: bool = True
) -> tuple[Stream, ...]:
    """Add the transfers and optimizer steps to what the ranks of a pipeline compute.

    A Receive comes before every computation that needs the result of another rank, a Send follows every one
    whose result another rank needs, and the clients' Steps come last. These have the same order on all ranks,
    because the gradient norm and overflows are determined collectively.

    Args:
        computed: by rank, everything but transfers and steps.
        train: whether there is a backward pass.
    """
    return tuple(
        tuple(_with_transfers_of_rank(pipeline, rank, order, train)) for rank, order in enumerate(computed)
    )


def _with_transfers_of_rank(
    pipeline: Pipeline, rank: int, order: Sequence[Instruction], train: bool
) -> Iterator[Instruction]:
    for work in order:
        if not isinstance(work, MicroBatchInstruction):
            yield work
            continue
        for kind, hop in inputs_of(pipeline, work):
            source = pipeline.sender(work.micro, kind, hop)
            if source != rank:
                yield Receive(work.micro, kind, hop, source)
        yield work
        for kind, hop in outputs_of(pipeline, work):
            to = pipeline.receiver(work.micro, kind, hop)
            if to != rank and (train or kind == "activation"):
                yield Send(work.micro, kind, hop, to)
    if train:
        yield from (Step(client) for client in sorted({micro.client for micro in pipeline.micros}))


def inputs_of(pipeline: Pipeline, work: Instruction) -> list[tuple[Kind, int]]:
    """Return (kind, hop) of the activation or gradient that a computation starts from."""
    if isinstance(work, Forward):
        return [("activation", work.chunk)]
    if isinstance(work, Head):
        return [("activation", len(pipeline.chunks))]
    return [("gradient", work.chunk)] if isinstance(work, Backward) else []


def outputs_of(pipeline: Pipeline, work: Instruction) -> list[tuple[Kind, int]]:
    """Return (kind, hop) of the activation or gradient that a computation produces.

    The gradient of the first chunk's input is not needed, because nothing before that chunk is trained.
    """
    if isinstance(work, Embed):
        return [("activation", 0)]
    if isinstance(work, Forward):
        return [("activation", work.chunk + 1)]
    if isinstance(work, Head):
        return [("gradient", len(pipeline.chunks) - 1)]
    return [("gradient", work.chunk - 1)] if isinstance(work, Backward) and work.chunk else []
