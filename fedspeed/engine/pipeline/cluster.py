"""A cluster's pipeline: all its clients in one pipeline over all of its ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from fedspeed import activity
from fedspeed.data.batches import Batch, StepBatches
from fedspeed.engine.client_engine import Sums
from fedspeed.engine.compute.micro_batches import MicroBatchTask, Score, seed_of
from fedspeed.engine.directions import perturbed
from fedspeed.engine.pipeline.generation import ClusterGeneration
from fedspeed.engine.pipeline.headers import EVALUATE, GATHER, IDLE, STEP, TRAIN, PassHeader, tell
from fedspeed.engine.pipeline.pipelined import PipelinedEngine
from fedspeed.engine.pipeline.stage_states import StageStates
from fedspeed.engine.pipeline.transfers import naming_lost_ranks
from fedspeed.engine.store_engine import evaluation_passes
from fedspeed.schedule.instructions import Micro
from fedspeed.schedule.schedules import shared

Tensors = dict[str, torch.Tensor]


class ClusterPipeline(ClusterGeneration, PipelinedEngine):
    """The first rank of each client embeds its micro-batches and holds its labels; every rank has a part of
    every client's adapter.

    Ranks act in passes that all of them make together. Each begins with a few words from everyone: who brings
    which micro-batches, whose state is new, and what was asked for since the last pass. Client slots of the
    cluster are counted through; such a number is a place.

    Args:
        owners: of all places, the rank whose data it is. mine: this rank's places, by its own slots.
        held: by rank, the names of the trainable tensors of its stage.
    """

    kind = "cluster_pipeline"

    def __init__(
        self,
        net,
        states,
        groups,
        *,
        owners: Sequence[int],
        mine: Sequence[int],
        held: Sequence[Sequence[str]],
        **parts,
    ):
        super().__init__(net, states, groups, matched_group=groups.cluster, loads=False, **parts)
        self._owners, self._mine = list(owners), list(mine)
        self._speaks = groups.client_rank == 0
        self._parts = StageStates(self._routes, self._owners, held, shapes=self._shapes, device=self._device)
        # By own place: what was loaded and not told yet.
        self._fresh: dict[int, tuple[Tensors, frozenset[str], int]] = {}
        self._seeds = [0] * len(self._mine)
        self._known: dict[int, Tensors] = {}  # own place -> its whole state, while it stands
        self._added: dict[int, Tensors] = {}  # own place -> what its next step's gradients grow by
        self._moves: list[
            tuple[int, int, float]
        ] = []  # (own place, seed, scale) of perturbations that were not told yet
        self._steps = 0

    @property
    def client_slots(self) -> int:
        return len(self._mine)

    def train_passes(
        self, clients: int, steps: int, accumulation: int, *, gradients: int = 1, reads: int = 0
    ) -> int:
        """Gradients, steps and reading states are passes of their own."""
        return -(-clients // self.client_slots) * (steps * (gradients + 1 + reads) + 1)

    def _load(self, slot, state, optimizer, frozen, seed):
        assert optimizer is None, "a cluster's pipeline keeps no optimizer (config/check.py)"
        place = self._mine[slot]
        self._fresh[place], self._seeds[slot], self._steps = (state, frozen, seed), seed, 0
        # Losses are scaled before the states are told, with the scale that they will begin with.
        self._states[place].scaler.reset()
        self._known.pop(place, None)
        self._moves = [move for move in self._moves if move[0] != place]

    def _forget(self, slot: int) -> None:
        self._added.pop(
            self._mine[slot], None
        )  # the stages let go of theirs when they hear of what is loaded

    def state(self, slot: int = 0) -> Tensors:
        place = self._mine[slot]
        if place in self._fresh:
            return {name: tensor.clone() for name, tensor in self._fresh[place][0].items()}
        if place not in self._known:
            self._count_pass()
            wanted = tuple(p for p in self._mine if p not in self._fresh) if self._speaks else ()
            self._pass(PassHeader(GATHER, named=wanted, moves=self._told_moves()))
        return {name: tensor.clone() for name, tensor in self._known[place].items()}

    def optimizer_state(self, slot: int = 0):
        raise AssertionError("a cluster's pipeline keeps no optimizer (config/check.py)")

    def perturb(self, slot: int, seed: int, scale: float) -> None:
        place = self._mine[slot]
        if place in self._fresh:
            state, frozen, turn = self._fresh[place]
            moving = {name: state[name] for name in self._shapes if name not in frozen}
            self._fresh[place] = state | perturbed(moving, seed, scale), frozen, turn
        else:
            self._moves.append((place, seed, scale))
            self._known.pop(place, None)

    def _add_to_gradients(self, slot: int, arrays: Mapping[str, np.ndarray], scale: float) -> None:
        place = self._mine[slot]
        added = self._added.setdefault(place, {n: torch.zeros(shape) for n, shape in self._shapes.items()})
        for name, array in arrays.items():
            added[name].add_(torch.from_numpy(np.asarray(array, np.float32)), alpha=scale)

    def _schedule(self, micros):
        return shared(micros, self.layout.ranks)

    def _gradients_together(self, work: Sequence[StepBatches]) -> list[Sums]:
        self._count_pass()
        with self._clock.stage("compute"):
            own = self._own_batches(work)
            told = tuple(
                tell(place, i, seed_of(self._seeds[self._mine.index(place)], self._steps, i), batch)
                for (place, i), (batch, _) in own.items()
            )
            self._steps += 1
            tasks = {
                (place, i): MicroBatchTask(
                    batch, place, self._states[place].scaler.scale / max(1, step.step_answer_tokens)
                )
                for (place, i), (batch, step) in own.items()
            }
            scores, _ = self._pass(self._header(TRAIN, micros=told), tasks)
            sums = [Sums()] * len(work)
            for (place, i), score in scores.items():
                sums[self._mine.index(place)] += Sums(score.loss, own[place, i][0].answer_tokens)
            get_accelerator().synchronize()
        return sums

    def _own_batches(self, work: Sequence[StepBatches]) -> dict[tuple[int, int], tuple[Batch, StepBatches]]:
        """By (place, number) the micro-batches that this rank brings."""
        if not self._speaks:
            return {}
        return {
            (self._mine[slot], i): (batch, step)
            for slot, step in enumerate(work)
            for i, batch in enumerate(step.micro)
        }

    def _step_together(self, slots: Sequence[int], lr: float) -> list[bool]:
        self._count_pass()
        with self._clock.stage("compute"):
            places = [self._mine[slot] for slot in slots]
            named = tuple(places) if self._speaks else ()
            added = tuple(self._added) if self._speaks else ()
            _, moved = self._pass(self._header(STEP, lr=lr, named=named, added=added))
            self._added.clear()
            self._known.clear()
            get_accelerator().synchronize()
        return [moved[place] for place in places]

    def evaluate(self, work: list[list[Batch]]) -> list[Sums]:
        sums = [Sums()] * len(work)
        place = self._mine[0]
        with self._clock.stage("compute"):
            for portion in evaluation_passes(work):
                self._count_pass()
                own = {(place, i): batch for i, (_, batch) in enumerate(portion)} if self._speaks else {}
                told = tuple(tell(place, i, 0, batch) for (_, i), batch in own.items())
                scores, _ = self._pass(
                    self._header(EVALUATE, micros=told),
                    {at: MicroBatchTask(batch, place) for at, batch in own.items()},
                )
                for (_, i), score in scores.items():
                    at, batch = portion[i]
                    sums[at] += Sums(score.loss, batch.answer_tokens, score.exact, score.rows)
                activity.advance(len(portion))
        return sums

    def _idle_pass(self, backward: bool) -> None:
        if not backward:
            self._pass(self._header(IDLE))
            return
        with self._passing():
            self._pass(self._header(IDLE))

    def _header(self, kind: int, **fields) -> PassHeader:
        """What this rank says before a pass, with what is new since the last one."""
        fresh = tuple((place, seed) for place, (_, _, seed) in self._fresh.items()) if self._speaks else ()
        return PassHeader(kind, fresh=fresh, moves=self._told_moves(), **fields)

    def _told_moves(self) -> tuple[tuple[int, int, float], ...]:
        told = tuple(self._moves)
        self._moves = []
        return told if self._speaks else ()

    def _pass(
        self, mine: PassHeader, tasks: dict | None = None
    ) -> tuple[dict[tuple[int, int], Score], dict[int, bool]]:
        """One pass, together with all ranks: ((place, number) -> score of own micro-batches, in STEP: place
        -> whether it moved).
        """
        headers = self._everyones(mine)
        kinds = [header.kind for header in headers]
        kind = max(kinds)
        assert all(own in (IDLE, kind) for own in kinds), f"ranks are at different passes: {kinds}"
        self._hear(headers)
        if kind == GATHER:
            self._gather([place for header in headers for place in header.named])
        if kind == STEP:
            return {}, self._step_places(headers)
        told = sorted(
            (micro for header in headers for micro in header.micros),
            key=lambda micro: (micro.number, micro.place),
        )
        if not told:
            return {}, {}
        known = tasks or {}
        all_tasks = []
        for micro in told:
            task = known.get((micro.place, micro.number)) or MicroBatchTask(micro.batch(), micro.place)
            all_tasks.append(replace(task, seed=micro.seed))
        micros = [Micro(micro.place, self._owners[micro.place], self._owners[micro.place]) for micro in told]
        scores = self._play(micros, all_tasks, train=kind == TRAIN)
        return {(told[m].place, told[m].number): score for m, score in scores.items()}, {}

    @naming_lost_ranks("while ranks agreed on a pass")
    def _everyones_integers(self, mine: list[int]) -> list[list[int]]:
        own = torch.tensor(mine, dtype=torch.int64)
        ranks = self.groups.cluster_size
        sizes = torch.zeros(ranks, dtype=torch.int64, device=self._device)
        dist.all_gather_into_tensor(
            sizes, torch.tensor([len(own)], device=self._device), group=self.groups.cluster
        )
        padded = torch.zeros(int(sizes.max()), dtype=torch.int64, device=self._device)
        padded[: len(own)] = own.to(self._device)
        whole = torch.zeros(ranks * len(padded), dtype=torch.int64, device=self._device)
        dist.all_gather_into_tensor(whole, padded, group=self.groups.cluster)
        return [row[:size].tolist() for row, size in zip(whole.cpu().view(ranks, -1), sizes.tolist())]

    def _everyones(self, mine: PassHeader) -> list[PassHeader]:
        return [PassHeader.read(integers) for integers in self._everyones_integers(mine.integers())]

    def _hear(self, headers: Sequence[PassHeader]) -> None:
        """Load what owners have loaded and move what they have perturbed, on every stage."""
        seeds = dict(pair for header in headers for pair in header.fresh)
        told = self._parts.scatter(
            list(seeds), lambda place: self._fresh[place][0], lambda place: self._fresh[place][1]
        )
        for place, (values, frozen) in told.items():
            self._grads.pop(place, None)
            self._states[place].load(values, None, frozen, seeds[place])
            self._fresh.pop(place, None)
        for place, seed, scale in (move for header in headers for move in header.moves):
            self._states[place].perturb(seed, scale)

    def _step_places(self, headers: Sequence[PassHeader]) -> dict[int, bool]:
        """Step all clients whose gradients wait; by place, whether it moved."""
        added = [place for header in headers for place in header.added]
        for place, (values, _) in self._parts.scatter(
            added, self._added.__getitem__, lambda place: frozenset()
        ).items():
            super()._add_to_gradients(place, {name: value.numpy() for name, value in values.items()}, 1.0)
        places = sorted(place for header in headers for place in header.named)
        return dict(zip(places, self._play_steps(places, max(header.lr for header in headers))))

    def _gather(self, places: Sequence[int]) -> None:
        """Tell owners the whole states of their clients; they tell their other ranks."""
        self._known |= self._parts.gather(places, lambda place: self._states[place].state())
        if self.groups.client_size == 1:
            return
        for place in (place for place in places if place in self._mine):
            size = sum(shape.numel() for shape in self._shapes.values())
            if self._speaks:
                flat = torch.cat([self._known[place][n].reshape(-1) for n in self._shapes]).to(self._device)
            else:
                flat = torch.empty(size, device=self._device)
            dist.broadcast(flat, self.groups.client_ranks[0], group=self.groups.client)
            self._known[place] = self._parts.parted(flat.cpu(), list(self._shapes))[0]
