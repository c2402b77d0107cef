"""Execute instruction streams: on a single rank layer by layer, or on the ranks of a pipeline."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Concatenate, ParamSpec, Protocol

import torch

from fedspeed.schedule.instructions import (
    Backward,
    Decide,
    Embed,
    Forward,
    Head,
    Instruction,
    Kind,
    Load,
    Loaded,
    PrefetchInputs,
    Receive,
    Release,
    Send,
    Step,
    Stream,
)

# Called after each instruction: its kind (monitor.trace.KINDS), its text, when it began and when it ended
# (s).
TraceSpan = Callable[[str, str, float, float], None]


class StageCompute(ABC):
    """What a player calls to execute instructions. A stage without a backward pass has only the abstract
    methods.
    """

    @abstractmethod
    def embed(self, micro: int) -> torch.Tensor:
        """Return the first block's input [B, T, hidden] of a micro-batch."""

    @abstractmethod
    def forward(self, micro: int, chunk: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output of a chunk of blocks, [B, T, hidden] from [B, T, hidden]."""

    @abstractmethod
    def head(self, micro: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """Compute final norm, head and loss; returns the gradient by `hidden` while training."""

    @abstractmethod
    def load(self, chunk: Loaded) -> None:
        """Load the weights of a chunk, or of embedding or head."""

    @abstractmethod
    def release(self, chunk: Loaded) -> None:
        """Release the weights of a chunk."""

    @abstractmethod
    def abandon(self) -> None:
        """Release all that a failed pass has loaded and kept, so that another pass can begin."""

    def backward(self, micro: int, chunk: int, output_grad: torch.Tensor) -> torch.Tensor | None:
        """Return the gradient by a chunk's input, given that by its output; None where nothing trains
        below.
        """
        raise AssertionError("this stage has no backward pass")

    def decide(self, chunk: int, hidden: dict[int, torch.Tensor]) -> None:
        """Decide what is kept for the backward pass.

        Args:
            hidden: by micro-batch, the chunk's input.
        """
        raise AssertionError("this stage has no backward pass")

    def prefetch(self, chunk: int) -> None:
        """Start to copy the stored inputs of a chunk back to the device."""
        raise AssertionError("this stage has no backward pass")


class TransferChannel(Protocol):
    """Describe the transfers between ranks (`pipeline.transfers.Transfers`)."""

    def send(self, tensor: torch.Tensor, micro: int, kind: Kind, hop: int, to: int) -> None: ...

    def receive(self, micro: int, kind: Kind, hop: int, source: int) -> torch.Tensor: ...


class _NoTransfers:
    """The channel of a rank whose stream neither sends nor receives."""

    def send(self, tensor: torch.Tensor, micro: int, kind: Kind, hop: int, to: int) -> None:
        raise AssertionError("a single rank does not send")

    def receive(self, micro: int, kind: Kind, hop: int, source: int) -> torch.Tensor:
        raise AssertionError("a single rank does not receive")


class StreamSchedule:
    """A stream in the form of DeepSpeed's schedules: an iterable of lists of instructions.

    Args:
        done: called after each instruction, once the next one is requested.

    Attributes:
        current: the instruction that is executed now.
    """

    def __init__(self, stream: Stream, done: Callable[[Instruction], None] | None = None):
        self._stream = stream
        self._done = done
        self.current: Instruction | str = "the beginning of a pass"

    def __iter__(self) -> Iterator[list[Instruction]]:
        for instruction in self._stream:
            self.current = instruction
            yield [instruction]
            if self._done is not None:
                self._done(instruction)

    @staticmethod
    def num_pipe_buffers() -> int:
        """Return the number of buffers that DeepSpeed allocates: none."""
        return 0


Arguments = ParamSpec("Arguments")
Method = Callable[Concatenate["InstructionExecutor", Arguments], None]


def timed(kind: str) -> Callable[[Method[Arguments]], Method[Arguments]]:
    """Decorate a method of the player so that it passes its duration to `trace`, if there is one."""

    def decorate(method: Method[Arguments]) -> Method[Arguments]:
        name = method.__name__.removeprefix("_exec_")

        def traced(self: "InstructionExecutor", /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
            if self._trace is None:
                method(self, *args, **kwargs)
                return
            begin = time.perf_counter()
            method(self, *args, **kwargs)
            self._trace(kind, f"{name} {' '.join(map(str, kwargs.values()))}", begin, time.perf_counter())

        traced.__name__ = method.__name__
        return traced

    return decorate


class InstructionExecutor:
    """Execute a stream by looking up each instruction in a map by its exact type. DeepSpeed's
    `PipelineEngine` does the same, and its loop may replace the one here. The player stores tensors on their
    way between two chunks.
    """

    _trace: TraceSpan | None = None

    def execute(
        self,
        schedule: StreamSchedule,
        *,
        chunks: int,
        compute: StageCompute,
        channel: TransferChannel | None = None,
        trace: TraceSpan | None = None,
    ) -> None:
        """Execute a stream.

        Args:
            chunks: of the whole model.
            channel: None where the stream neither sends nor receives.
        """
        self._chunks = chunks
        self._compute = compute
        self._channel: TransferChannel = channel or _NoTransfers()
        self._trace = trace
        self._in_flight: dict[tuple[int, Kind, int], torch.Tensor] = {}
        self._exec_schedule(schedule)

    def execute_standalone(self, schedule: StreamSchedule, *, chunks: int, compute: StageCompute) -> None:
        """Execute the stream of a rank that computes without others. If it fails, everything that was loaded
        and kept is released.
        """
        try:
            self.execute(schedule, chunks=chunks, compute=compute)
        except BaseException:
            compute.abandon()
            raise
        finally:
            self._in_flight = {}
            del self._compute

    def execute_steps(
        self, schedule: StreamSchedule, step: Callable[[int], None], trace: TraceSpan | None = None
    ) -> None:
        """Execute the optimizer steps of some clients; `step` takes that of one client slot."""
        self._step_client = step
        self._trace = trace
        self._exec_schedule(schedule)

    def _exec_schedule(self, schedule: StreamSchedule) -> None:
        for instructions in schedule:
            for instruction in instructions:
                self._INSTRUCTION_MAP[type(instruction)](self, **instruction.kwargs)

    @timed("compute")
    def _exec_embed(self, micro: int) -> None:
        self._in_flight[micro, "activation", 0] = self._compute.embed(micro)

    @timed("compute")
    def _exec_forward(self, micro: int, chunk: int) -> None:
        hidden = self._compute.forward(micro, chunk, self._in_flight.pop((micro, "activation", chunk)))
        self._in_flight[micro, "activation", chunk + 1] = hidden

    @timed("compute")
    def _exec_head(self, micro: int) -> None:
        grad = self._compute.head(micro, self._in_flight.pop((micro, "activation", self._chunks)))
        if grad is not None:
            self._in_flight[micro, "gradient", self._chunks - 1] = grad

    @timed("compute")
    def _exec_backward(self, micro: int, chunk: int) -> None:
        grad = self._compute.backward(micro, chunk, self._in_flight.pop((micro, "gradient", chunk)))
        if grad is not None:
            self._in_flight[micro, "gradient", chunk - 1] = grad

    @timed("send")
    def _exec_send(self, micro: int, kind: Kind, hop: int, to: int) -> None:
        self._channel.send(self._in_flight.pop((micro, kind, hop)), micro, kind, hop, to)

    @timed("wait")
    def _exec_receive(self, micro: int, kind: Kind, hop: int, source: int) -> None:
        self._in_flight[micro, kind, hop] = self._channel.receive(micro, kind, hop, source)

    @timed("load")
    def _exec_load(self, chunk: Loaded) -> None:
        self._compute.load(chunk)

    @timed("load")
    def _exec_release(self, chunk: Loaded) -> None:
        self._compute.release(chunk)

    @timed("compute")
    def _exec_decide(self, chunk: int) -> None:
        inputs = {
            micro: hidden
            for (micro, kind, hop), hidden in self._in_flight.items()
            if (kind, hop) == ("activation", chunk)
        }
        self._compute.decide(chunk, inputs)

    @timed("load")
    def _exec_prefetch_inputs(self, chunk: int) -> None:
        self._compute.prefetch(chunk)

    @timed("step")
    def _exec_step(self, client: int) -> None:
        self._step_client(client)

    _INSTRUCTION_MAP: dict[type[Instruction], Callable[..., None]] = {
        Embed: _exec_embed,
        Forward: _exec_forward,
        Head: _exec_head,
        Backward: _exec_backward,
        Send: _exec_send,
        Receive: _exec_receive,
        Load: _exec_load,
        Release: _exec_release,
        Decide: _exec_decide,
        PrefetchInputs: _exec_prefetch_inputs,
        Step: _exec_step,
    }
