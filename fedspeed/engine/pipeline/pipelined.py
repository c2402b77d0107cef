"""The common part of engines whose model is divided over ranks."""

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from deepspeed import comm as dist
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from fedspeed.data.batches import StepBatches
from fedspeed.engine.base.store import BaseStore
from fedspeed.engine.client_engine import Sums
from fedspeed.engine.client_state import ClientState
from fedspeed.engine.clock import Clock
from fedspeed.engine.compute.micro_batches import MicroBatchTask, Score
from fedspeed.engine.generation.pieces import Piece
from fedspeed.engine.generation.stage import PieceStage
from fedspeed.engine.groups import Groups, world_deadline
from fedspeed.engine.instruction_executor import StageCompute
from fedspeed.engine.pipeline.engine import FederatedPipelineEngine
from fedspeed.engine.pipeline.transfers import Routes, Transfers
from fedspeed.engine.stage import Stage
from fedspeed.engine.store_engine import StoreEngine
from fedspeed.schedule.instructions import Micro, Pipeline, Step, Stream
from fedspeed.schedule.layout import Layout
from fedspeed.schedule.schedules import forward_only

CACHED_SCHEDULES = 64


@dataclass(frozen=True)
class PipelineParts:
    """The parts that a rank's pipeline engine is made of.

    Attributes:
        store: the frozen parameters of this rank's stage.
        pipe: executes instruction streams.
        stage: computes micro-batches.
        layout: which rank computes which blocks.
        loads: whether chunks are loaded and released during a pass.
    """

    store: BaseStore
    pipe: FederatedPipelineEngine
    stage: Stage
    layout: Layout
    loads: bool


class PipelinedEngine(StoreEngine):
    """An engine in which every rank of the torch world is a pipeline stage. A rank has the trainable tensors
    of its blocks, for every client that trains in the pipeline.

    Args:
        states: the client slots of this stage.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        states: list[ClientState],
        groups: Groups,
        *,
        matched_group: ProcessGroup | None,
        parts: PipelineParts,
        clock: Clock,
    ):
        super().__init__(model, states, groups, matched_group=matched_group, store=parts.store, clock=clock)
        self.pipe = parts.pipe
        self.layout = parts.layout
        self._stage = parts.stage
        self._loads = parts.loads
        self._rank: int = dist.get_rank()
        self._piece_stage = PieceStage(model, parts.store, parts.layout.chunks, rows=self._logit_rows)
        self._routes = Routes(world_deadline(), self._device)
        self._busy_s = 0.0  # of training passes
        self._pass_s = 0.0
        trainable = {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}
        self._shapes = {name: p.shape for name, p in trainable.items()}
        self._dtype = next(iter(trainable.values())).dtype
        self._streams = lru_cache(CACHED_SCHEDULES)(self._make_streams)

    @property
    def names(self) -> list[str]:
        """Names of the whole model's trainable tensors; this rank's slots have those of its own stage."""
        return list(self._shapes)

    @property
    def data_share(self) -> tuple[int, int]:
        """(1, 0): all ranks of a client work on the same rows."""
        return 1, 0

    @abstractmethod
    def _schedule(self, micros: tuple[Micro, ...]) -> tuple[Stream, ...]:
        """Return the streams of all ranks for a training pass."""

    def _make_streams(self, micros: tuple[Micro, ...], train: bool) -> tuple[Stream, ...]:
        """Return the streams of all ranks for a pass. Steps are left out, since they are taken by `step`."""
        if not train:
            return forward_only(Pipeline(self.layout.ranks, self.layout.holders, micros), self._loads)
        streams = self._schedule(micros)
        return tuple(tuple(work for work in stream if not isinstance(work, Step)) for stream in streams)

    def _play(
        self, micros: Sequence[Micro], tasks: Sequence[MicroBatchTask], *, train: bool
    ) -> dict[int, Score]:
        """Take micro-batches through the pipeline; with `train` also backwards, and add up their gradients.

        Returns:
            the scores of the micro-batches whose labels are on this rank, by number.
        """
        streams = self._streams(tuple(micros), train)
        tensors = [state.tensors() for state in self._states]
        self._stage.begin(tasks, tensors, streams[self._rank], train=train)
        self._execute(streams, self._stage, lambda m: tasks[m].batch.attention_mask.shape, train=train)
        scores, grads = self._stage.end()
        if train:
            for slot in sorted({micro.client for micro in micros}):
                self._accumulate(slot, grads[slot])
        return scores

    def _execute(
        self,
        streams: Sequence[Stream],
        stage: StageCompute,
        shape_of: Callable[[int], tuple[int, ...]],
        *,
        train: bool,
    ) -> None:
        """Execute this rank's stream of one pass. Only training passes count as busy time.

        Args:
            streams: of all ranks.
            shape_of: returns (rows, tokens) of a micro-batch.
        """
        hidden: int = self.model.config.hidden_size
        before = self._busy_s
        transfers = Transfers(
            self._routes,
            streams,
            self._rank,
            shape_of=lambda m: torch.Size((*shape_of(m), hidden)),
            dtype=self._dtype,
            device=self._device,
        )
        self.pipe.play(streams[self._rank], len(self.layout.chunks), stage, transfers, self._record_span)
        if not train:
            self._busy_s = before

    def _play_steps(self, slots: Sequence[int], lr: float) -> list[bool]:
        """Take the steps of some slots; returns for each whether it was applied. All ranks use the same
        order, since norms and overflows are found by collectives.
        """
        applied: dict[int, bool] = {}

        def step(slot: int) -> None:
            applied[slot] = self._step_slot(slot, lr)

        self.pipe.play_steps(tuple(Step(slot) for slot in slots), step, self._record_span)
        return [applied[slot] for slot in slots]

    @contextmanager
    def _training_pass(self) -> Iterator[None]:
        """Count the seconds inside as those of a training pass. A pass begins or ends with a collective, so
        that waiting for the slowest rank is included.
        """
        begin = time.perf_counter()
        yield
        self._pass_s += time.perf_counter() - begin

    def _gradients(self, work: Sequence[StepBatches]) -> list[Sums]:
        with self._training_pass():
            return self._gradients_together(work)

    def _step(self, slots: Sequence[int], lr: float) -> list[bool]:
        with self._training_pass():
            return self._step_together(slots, lr)

    @abstractmethod
    def _gradients_together(self, work: Sequence[StepBatches]) -> list[Sums]:
        """Compute gradients together with the other ranks; see `gradients`."""

    @abstractmethod
    def _step_together(self, slots: Sequence[int], lr: float) -> list[bool]:
        """Take optimizer steps together with the other ranks; see `step`."""

    def _record_span(self, kind: str, name: str, begin: float, end: float) -> None:
        self._busy_s += end - begin if kind in ("compute", "step") else 0.0
        self._clock.trace.span(kind, name, begin, end)

    def take_bubble(self) -> tuple[float, float]:
        taken = self._pass_s - self._busy_s, self._pass_s
        self._busy_s = 0.0
        self._pass_s = 0.0
        return taken

    @property
    def base_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if not p.requires_grad)

    # Generation.

    def piece_passes(self, pieces: Sequence[Piece]) -> int:
        return min(1, len(pieces))

    def _play_pieces(self, micros: Sequence[Micro], pieces: Sequence[Piece]) -> dict[int, torch.Tensor]:
        """Take pieces of tokens through the pipeline, each under the state of its micro-batch's client;
        returns the values of those whose head is on this rank, by number.
        """
        streams = self._streams(tuple(micros), False)
        if self.model.training:
            self.model.eval()
        tensors = [self._states[micro.client].tensors() for micro in micros]
        self._piece_stage.begin(pieces, tensors, streams[self._rank])
        self._execute(streams, self._piece_stage, lambda m: pieces[m].tokens.shape, train=False)
        return self._piece_stage.end()
