"""Executes instruction streams: of one rank that goes layer by layer, and of the ranks of a pipeline."""

import time
from collections.abc import Callable
from typing import Protocol

import torch

from fedspeed.schedule.instructions import (
    Backward,
    Bring,
    Decide,
    Embed,
    Forward,
    Head,
    Instruction,
    Kind,
    Load,
    Loaded,
    Receive,
    Release,
    Send,
    Step,
    Stream,
)

# Told of each instruction: its kind (monitor.trace.KINDS), itself, when it began and ended.
Note = Callable[[str, str, float, float], None]


class StageCompute(Protocol):
    """What a player asks of a rank. `hidden`: activations [B, T, hidden]; what is not in a stream is not
    asked for.
    """

    def embed(self, micro: int) -> torch.Tensor: ...

    def forward(self, micro: int, chunk: int, hidden: torch.Tensor) -> torch.Tensor: ...

    def head(self, micro: int, hidden: torch.Tensor) -> torch.Tensor | None: ...

    def backward(self, micro: int, chunk: int, upward: torch.Tensor) -> torch.Tensor | None: ...

    def load(self, chunk: Loaded) -> None: ...

    def release(self, chunk: Loaded) -> None: ...

    def decide(self, chunk: int, hidden: dict[int, torch.Tensor]) -> None: ...

    def bring(self, chunk: int) -> None: ...


class StandaloneCompute(StageCompute, Protocol):
    """The same of a rank that goes on after a pass that has failed."""

    def abandon(self) -> None: ...


class TransferChannel(Protocol):
    """What a player asks of the transfers between ranks (`pipeline.transfers.Transfers`)."""

    def send(self, tensor: torch.Tensor, micro: int, kind: Kind, hop: int, to: int) -> None: ...

    def receive(self, micro: int, kind: Kind, hop: int, source: int) -> torch.Tensor: ...


class StreamSchedule:
    """A stream, as DeepSpeed iterates over schedules; remembers where it is.

    Args:
        done: told of each instruction once the next one is asked for.
    """

    def __init__(self, stream: Stream, done: Callable[[Instruction], None] | None = None):
        self._stream = stream
        self._done = done
        self.current: Instruction | str = "the beginning of a pass"

    def __iter__(self):
        for instruction in self._stream:
            self.current = instruction
            yield [instruction]
            if self._done is not None:
                self._done(instruction)

    @staticmethod
    def num_pipe_buffers() -> int:
        return 0


def timed(kind: str):
    """Tell the player's `note`, where there is one, how long an instruction took."""

    def around(method):
        name = method.__name__.removeprefix("_exec_")

        def noted(self, **kwargs):
            if self._note is None:
                method(self, **kwargs)
                return
            begin = time.perf_counter()
            method(self, **kwargs)
            self._note(kind, f"{name} {' '.join(map(str, kwargs.values()))}", begin, time.perf_counter())

        noted.__name__ = method.__name__
        return noted

    return around


class Player:
    """Looks up each instruction in a map, by its exact type, as DeepSpeed's `PipelineEngine` does, whose loop
    may take the place of the one here. Keeps what is on its way between two chunks.
    """

    _note: Note | None = None

    def execute(
        self,
        schedule: StreamSchedule,
        *,
        chunks: int,
        computes: StageCompute,
        carries: TransferChannel | None = None,
        note: Note | None = None,
    ) -> None:
        """Execute a stream.

        Args:
            chunks: of the whole model. carries: None where the stream neither sends nor receives.
        """
        self._chunks = chunks
        self._computes = computes
        self._carries = carries
        self._note = note
        self._held: dict[tuple[int, Kind, int], torch.Tensor | None] = {}
        self._exec_schedule(schedule)

    def execute_standalone(
        self, schedule: StreamSchedule, *, chunks: int, computes: StandaloneCompute
    ) -> None:
        """Execute the stream of a rank that computes by itself; what it has loaded and kept is let go of
        where that fails.
        """
        try:
            self.execute(schedule, chunks=chunks, computes=computes)
        except BaseException:
            computes.abandon()
            raise
        finally:
            self._held = {}
            self._computes = None

    def execute_steps(
        self, schedule: StreamSchedule, step: Callable[[int], None], note: Note | None = None
    ) -> None:
        """Execute the optimizer steps of some clients; `step` takes that of one."""
        self._step_client = step
        self._note = note
        self._exec_schedule(schedule)

    def _exec_schedule(self, schedule: StreamSchedule) -> None:
        for instructions in schedule:
            for work in instructions:
                self._INSTRUCTION_MAP[type(work)](self, **work.kwargs)

    @timed("compute")
    def _exec_embed(self, micro: int) -> None:
        self._held[micro, "activation", 0] = self._computes.embed(micro)

    @timed("compute")
    def _exec_forward(self, micro: int, chunk: int) -> None:
        hidden = self._computes.forward(micro, chunk, self._held.pop((micro, "activation", chunk)))
        self._held[micro, "activation", chunk + 1] = hidden

    @timed("compute")
    def _exec_head(self, micro: int) -> None:
        flow = self._computes.head(micro, self._held.pop((micro, "activation", self._chunks)))
        self._held[micro, "gradient", self._chunks - 1] = flow

    @timed("compute")
    def _exec_backward(self, micro: int, chunk: int) -> None:
        flow = self._computes.backward(micro, chunk, self._held.pop((micro, "gradient", chunk)))
        self._held[micro, "gradient", chunk - 1] = flow

    @timed("send")
    def _exec_send(self, micro: int, kind: Kind, hop: int, to: int) -> None:
        self._carries.send(self._held.pop((micro, kind, hop)), micro, kind, hop, to)

    @timed("wait")
    def _exec_receive(self, micro: int, kind: Kind, hop: int, source: int) -> None:
        self._held[micro, kind, hop] = self._carries.receive(micro, kind, hop, source)

    @timed("load")
    def _exec_load(self, chunk: Loaded) -> None:
        self._computes.load(chunk)

    @timed("load")
    def _exec_release(self, chunk: Loaded) -> None:
        self._computes.release(chunk)

    @timed("compute")
    def _exec_decide(self, chunk: int) -> None:
        waiting = {
            micro: hidden
            for (micro, kind, hop), hidden in self._held.items()
            if (kind, hop) == ("activation", chunk)
        }
        self._computes.decide(chunk, waiting)

    @timed("load")
    def _exec_bring(self, chunk: int) -> None:
        self._computes.bring(chunk)

    @timed("step")
    def _exec_step(self, client: int) -> None:
        self._step_client(client)

    _INSTRUCTION_MAP = {
        Embed: _exec_embed,
        Forward: _exec_forward,
        Head: _exec_head,
        Backward: _exec_backward,
        Send: _exec_send,
        Receive: _exec_receive,
        Load: _exec_load,
        Release: _exec_release,
        Decide: _exec_decide,
        Bring: _exec_bring,
        Step: _exec_step,
    }
