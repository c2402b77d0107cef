"""A pipeline over all ranks of a cluster, through which all its clients train together."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedModel

from fedspeed import activity
from fedspeed.data.batches import Batch, StepBatches
from fedspeed.engine.client_engine import Sums, Tensors
from fedspeed.engine.client_state import ClientState
from fedspeed.engine.clock import Clock
from fedspeed.engine.compute.micro_batches import MicroBatchTask, Score, seed_of
from fedspeed.engine.directions import perturbed
from fedspeed.engine.groups import Groups
from fedspeed.engine.pipeline.generation import ClusterGeneration
from fedspeed.engine.pipeline.headers import EVALUATE, GATHER, IDLE, STEP, TRAIN, MicroBatchHeader, PassHeader
from fedspeed.engine.pipeline.pipelined import PipelineParts
from fedspeed.engine.pipeline.stage_states import StageStates
from fedspeed.engine.pipeline.transfers import naming_lost_ranks
from fedspeed.engine.store_engine import evaluation_passes
from fedspeed.schedule.instructions import Micro, Stream
from fedspeed.schedule.schedules import shared

Position = tuple[int, int]  # (global slot, number of a micro-batch in its step)


class _Loaded(NamedTuple):
    """What `load` has set for a client slot and the stages have not received yet."""

    state: Tensors
    frozen: frozenset[str]
    seed: int


class _Result(NamedTuple):
    """What a rank gets from a pass: scores of its own micro-batches, and in STEP which steps were applied, by
    global slot.
    """

    scores: dict[Position, Score]
    applied: dict[int, bool]


class ClusterPipeline(ClusterGeneration):
    """A cluster's pipeline. The first rank of each client embeds its micro-batches and has its labels; every
    rank has a part of every client's adapter.

    All ranks make each pass together. It begins with an exchange of headers: which micro-batches each rank
    contributes, which states it has loaded, and what was requested since the last pass. Client slots are
    numbered over the whole cluster (global slots).

    Args:
        owners: by global slot, the rank that has its client's data.
        own_slots: global slots of this rank's clients, by local slot.
        stage_names: by rank, the names of the trainable tensors of its stage.
    """

    kind = "cluster_pipeline"

    def __init__(
        self,
        model: PreTrainedModel,
        states: list[ClientState],
        groups: Groups,
        *,
        owners: Sequence[int],
        own_slots: Sequence[int],
        stage_names: Sequence[Sequence[str]],
        parts: PipelineParts,
        clock: Clock,
    ):
        super().__init__(model, states, groups, matched_group=groups.cluster, parts=parts, clock=clock)
        self._owners = list(owners)
        self._own_slots = list(own_slots)
        self._is_gateway = groups.client_rank == 0
        self._stage_states = StageStates(
            self._routes, self._owners, stage_names, shapes=self._shapes, device=self._device
        )
        # By global slot of this rank:
        self._loaded: dict[int, _Loaded] = {}
        self._gathered: dict[int, Tensors] = {}  # whole states, until the next step changes them
        self._added: dict[int, Tensors] = {}  # arrays to add to the gradients of the next step
        self._perturbed: list[tuple[int, int, float]] = []  # (global slot, seed, scale) since the last pass
        self._seeds = [0] * len(self._own_slots)  # by local slot
        self._steps = 0  # local steps since `load`

    @property
    def client_slots(self) -> int:
        return len(self._own_slots)

    def train_passes(
        self, clients: int, steps: int, accumulation: int, *, gradients: int = 1, reads: int = 0
    ) -> int:
        """Return the number of training passes. Gradients, steps and reads of states are passes of their
        own.
        """
        return -(-clients // self.client_slots) * (steps * (gradients + 1 + reads) + 1)

    def _load(
        self, slot: int, state: Tensors, optimizer: Tensors | None, frozen: frozenset[str], seed: int
    ) -> None:
        assert optimizer is None, "a cluster's pipeline keeps no optimizer (config/check.py)"
        global_slot = self._own_slots[slot]
        self._loaded[global_slot] = _Loaded(state, frozen, seed)
        self._seeds[slot] = seed
        self._steps = 0
        # The first losses are scaled before the stages receive the states, with the initial scale.
        self._states[global_slot].scaler.reset()
        self._gathered.pop(global_slot, None)
        self._perturbed = [entry for entry in self._perturbed if entry[0] != global_slot]

    def _drop_gradients(self, slot: int) -> None:
        # The stages drop their gradients when they receive the state that is loaded.
        self._added.pop(self._own_slots[slot], None)

    def state(self, slot: int = 0) -> Tensors:
        global_slot = self._own_slots[slot]
        if global_slot in self._loaded:
            return {name: tensor.clone() for name, tensor in self._loaded[global_slot].state.items()}
        if global_slot not in self._gathered:
            self._count_pass()
            wanted = tuple(s for s in self._own_slots if s not in self._loaded) if self._is_gateway else ()
            self._pass(PassHeader(GATHER, slots=wanted, perturbed=self._take_perturbed()))
        return {name: tensor.clone() for name, tensor in self._gathered[global_slot].items()}

    def optimizer_state(self, slot: int = 0) -> Tensors:
        raise AssertionError("a cluster's pipeline keeps no optimizer (config/check.py)")

    def perturb(self, slot: int, seed: int, scale: float) -> None:
        global_slot = self._own_slots[slot]
        if global_slot in self._loaded:
            loaded = self._loaded[global_slot]
            values = {name: loaded.state[name] for name in self._shapes if name not in loaded.frozen}
            state = loaded.state | perturbed(values, seed, scale)
            self._loaded[global_slot] = loaded._replace(state=state)
        else:
            self._perturbed.append((global_slot, seed, scale))
            self._gathered.pop(global_slot, None)

    def _add_to_gradients(self, slot: int, arrays: Mapping[str, np.ndarray], scale: float) -> None:
        zeros = {name: torch.zeros(shape) for name, shape in self._shapes.items()}
        added = self._added.setdefault(self._own_slots[slot], zeros)
        for name, array in arrays.items():
            added[name].add_(torch.from_numpy(np.asarray(array, np.float32)), alpha=scale)

    def _schedule(self, micros: tuple[Micro, ...]) -> tuple[Stream, ...]:
        return shared(micros, self.layout.ranks)

    def _gradients_together(self, work: Sequence[StepBatches]) -> list[Sums]:
        self._count_pass()
        with self._clock.stage("compute"):
            own = self._own_batches(work)
            headers = []
            tasks = {}
            for (global_slot, i), (batch, step) in own.items():
                seed = seed_of(self._seeds[self._own_slots.index(global_slot)], self._steps, i)
                headers.append(MicroBatchHeader.of(batch, global_slot, i, seed))
                scale = self._states[global_slot].scaler.scale / max(1, step.step_answer_tokens)
                tasks[global_slot, i] = MicroBatchTask(batch, global_slot, scale)
            self._steps += 1
            scores = self._pass(self._header(TRAIN, micros=tuple(headers)), tasks).scores
            sums = [Sums()] * len(work)
            for position, score in scores.items():
                slot = self._own_slots.index(position[0])
                sums[slot] += Sums(score.loss, own[position][0].answer_tokens)
            get_accelerator().synchronize()
        return sums

    def _own_batches(self, work: Sequence[StepBatches]) -> dict[Position, tuple[Batch, StepBatches]]:
        """Return the micro-batches that this rank contributes, each with its step."""
        if not self._is_gateway:
            return {}
        return {
            (self._own_slots[slot], i): (batch, step)
            for slot, step in enumerate(work)
            for i, batch in enumerate(step.micro)
        }

    def _step_together(self, slots: Sequence[int], lr: float) -> list[bool]:
        self._count_pass()
        with self._clock.stage("compute"):
            global_slots = [self._own_slots[slot] for slot in slots]
            named = tuple(global_slots) if self._is_gateway else ()
            added = tuple(self._added) if self._is_gateway else ()
            applied = self._pass(self._header(STEP, lr=lr, slots=named, added=added)).applied
            self._added.clear()
            self._gathered.clear()
            get_accelerator().synchronize()
        return [applied[slot] for slot in global_slots]

    def evaluate(self, work: list[list[Batch]]) -> list[Sums]:
        sums = [Sums()] * len(work)
        first = self._own_slots[0]
        with self._clock.stage("compute"):
            for batches in evaluation_passes(work):
                self._count_pass()
                own = dict(enumerate(batch for _, batch in batches)) if self._is_gateway else {}
                headers = tuple(MicroBatchHeader.of(batch, first, i, 0) for i, batch in own.items())
                tasks = {(first, i): MicroBatchTask(batch, first) for i, batch in own.items()}
                scores = self._pass(self._header(EVALUATE, micros=headers), tasks).scores
                for (_, i), score in scores.items():
                    number, batch = batches[i]
                    sums[number] += Sums(score.loss, batch.answer_tokens, score.exact, score.rows)
                activity.advance(len(batches))
        return sums

    def _idle_pass(self, backward: bool) -> None:
        if not backward:
            self._pass(self._header(IDLE))
            return
        with self._training_pass():
            self._pass(self._header(IDLE))

    def _header(self, kind: int, **fields: Any) -> PassHeader:
        """Return this rank's header, with the slots that were loaded or perturbed since the last pass."""
        loaded = tuple((slot, entry.seed) for slot, entry in self._loaded.items()) if self._is_gateway else ()
        return PassHeader(kind, loaded=loaded, perturbed=self._take_perturbed(), **fields)

    def _take_perturbed(self) -> tuple[tuple[int, int, float], ...]:
        """Return the perturbations since the last pass; the client's gateway announces them for all its
        ranks.
        """
        taken = tuple(self._perturbed)
        self._perturbed = []
        return taken if self._is_gateway else ()

    def _pass(
        self, header: PassHeader, own_tasks: Mapping[Position, MicroBatchTask] | None = None
    ) -> _Result:
        """Make a pass together with all ranks.

        Args:
            header: of this rank.
            own_tasks: the micro-batches that this rank contributes.
        """
        headers = self._everyones(header)
        kinds = [other.kind for other in headers]
        kind = max(kinds)
        assert all(other in (IDLE, kind) for other in kinds), f"ranks are at different passes: {kinds}"
        self._update_slots(headers)
        if kind == GATHER:
            self._gather([slot for other in headers for slot in other.slots])
        if kind == STEP:
            return _Result({}, self._step_slots(headers))
        micros = sorted(
            (micro for other in headers for micro in other.micros),
            key=lambda micro: (micro.number, micro.global_slot),
        )
        if not micros:
            return _Result({}, {})
        tasks = []
        for micro in micros:
            task = (own_tasks or {}).get((micro.global_slot, micro.number))
            task = task or MicroBatchTask(micro.batch(), micro.global_slot)
            tasks.append(replace(task, seed=micro.seed))
        owned = [(micro.global_slot, self._owners[micro.global_slot]) for micro in micros]
        scores = self._play([Micro(slot, owner, owner) for slot, owner in owned], tasks, train=kind == TRAIN)
        return _Result({(micros[m].global_slot, micros[m].number): score for m, score in scores.items()}, {})

    @naming_lost_ranks("while ranks agreed on a pass")
    def _everyones_integers(self, own: list[int]) -> list[list[int]]:
        values = torch.tensor(own, dtype=torch.int64)
        ranks = self.groups.cluster_size
        sizes = torch.zeros(ranks, dtype=torch.int64, device=self._device)
        dist.all_gather_into_tensor(
            sizes, torch.tensor([len(values)], device=self._device), group=self.groups.cluster
        )
        padded = torch.zeros(int(sizes.max()), dtype=torch.int64, device=self._device)
        padded[: len(values)] = values.to(self._device)
        whole = torch.zeros(ranks * len(padded), dtype=torch.int64, device=self._device)
        dist.all_gather_into_tensor(whole, padded, group=self.groups.cluster)
        return [row[:size].tolist() for row, size in zip(whole.cpu().view(ranks, -1), sizes.tolist())]

    def _everyones(self, header: PassHeader) -> list[PassHeader]:
        """Exchange headers. Collective over the cluster."""
        return [PassHeader.read(integers) for integers in self._everyones_integers(header.integers())]

    def _update_slots(self, headers: Sequence[PassHeader]) -> None:
        """Load the states that owners have loaded into this stage's slots, and apply perturbations."""
        seeds = dict(pair for header in headers for pair in header.loaded)
        received = self._stage_states.scatter(
            list(seeds), lambda slot: self._loaded[slot].state, lambda slot: self._loaded[slot].frozen
        )
        for slot, (values, frozen) in received.items():
            self._grads.pop(slot, None)
            self._states[slot].load(values, None, frozen, seeds[slot])
            self._loaded.pop(slot, None)
        for slot, seed, scale in (entry for header in headers for entry in header.perturbed):
            self._states[slot].perturb(seed, scale)

    def _step_slots(self, headers: Sequence[PassHeader]) -> dict[int, bool]:
        """Take the steps of all slots that have gradients; returns which were applied, by global slot."""
        added = [slot for header in headers for slot in header.added]
        received = self._stage_states.scatter(added, self._added.__getitem__, lambda slot: frozenset())
        for slot, (values, _) in received.items():
            super()._add_to_gradients(slot, {name: value.numpy() for name, value in values.items()}, 1.0)
        slots = sorted(slot for header in headers for slot in header.slots)
        return dict(zip(slots, self._play_steps(slots, max(header.lr for header in headers))))

    def _gather(self, slots: Sequence[int]) -> None:
        """Collect the whole states of some global slots at their owners, which send them to their client's
        other ranks.
        """
        self._gathered |= self._stage_states.gather(slots, lambda slot: self._states[slot].state())
        if self.groups.client_size == 1:
            return
        for slot in (slot for slot in slots if slot in self._own_slots):
            size = sum(shape.numel() for shape in self._shapes.values())
            if self._is_gateway:
                parts = [self._gathered[slot][name].reshape(-1) for name in self._shapes]
                flat = torch.cat(parts).to(self._device)
            else:
                flat = torch.empty(size, device=self._device)
            dist.broadcast(flat, self.groups.client_ranks[0], group=self.groups.client)
            self._gathered[slot] = self._stage_states.split(flat.cpu(), list(self._shapes))[0]
