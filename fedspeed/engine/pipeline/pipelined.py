"""Engines whose model lies across ranks: a client's pipeline over its own ranks, and a cluster's over the ranks of all its clients."""

import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from fedspeed import activity
from fedspeed.data.batches import Batch, StepBatches
from fedspeed.engine.base.store import BaseStore
from fedspeed.engine.cell_model import Cell, Score
from fedspeed.engine.client_engine import Sums
from fedspeed.engine.client_state import ClientState
from fedspeed.engine.generation.pipelines import ClientPieces, ClusterPieces, PipelinedPieces, make_piece_stage
from fedspeed.engine.groups import Groups, world_deadline
from fedspeed.engine.pipeline.engine import FederatedPipelineEngine
from fedspeed.engine.pipeline.stage import Stage
from fedspeed.engine.pipeline.transfers import Routes, Transfers, losses_named
from fedspeed.engine.store_engine import StoreEngine, hand_over, portions
from fedspeed.models.folded import trainable
from fedspeed.schedule.instructions import Micro, Pipeline, Step, Stream
from fedspeed.schedule.layout import Layout
from fedspeed.schedule.schedules import forward_only, one_f_one_b, shared, streamed, taking_turns

SCHEDULES = 64  # kept, by what they were made for


class PipelinedEngine(PipelinedPieces, StoreEngine):
    """What both have in common. Every rank of the torch world is a stage; it holds the trainable tensors of its blocks, for every client that trains there.

    Args:
        states: of this stage, one for each client that trains at the same time.
        loads: whether chunks are loaded and released.
    """

    def __init__(self, net, states: list[ClientState], groups: Groups, matched, store: BaseStore, pipe: FederatedPipelineEngine, stage: Stage, layout: Layout,
                 loads: bool, clock):
        super().__init__(net, states, groups, matched, store, clock)
        self.pipe, self.layout = pipe, layout
        self._stage, self._loads, self._me = stage, loads, dist.get_rank()
        self._piece_stage = make_piece_stage(net, store, layout, self._logit_rows)
        self._routes = Routes(world_deadline(), self._device)
        self._busy_s = self._pass_s = 0.0  # of training passes
        shapes = {n: p for n, p in sorted(net.named_parameters()) if p.requires_grad}
        self._shapes = {name: p.shape for name, p in shapes.items()}
        self._dtype = next(iter(shapes.values())).dtype
        self._streams = lru_cache(SCHEDULES)(self._made)

    @property
    def names(self) -> list[str]:
        """Of the whole model; this rank's states have those of its own stage."""
        return list(self._shapes)

    @property
    def data_share(self) -> tuple[int, int]:
        """A client's ranks work on the same rows."""
        return 1, 0

    @abstractmethod
    def _schedule(self, micros: tuple[Micro, ...]) -> tuple[Stream, ...]:
        """Of a training pass."""

    def _made(self, micros: tuple[Micro, ...], train: bool) -> tuple[Stream, ...]:
        if train:  # optimizer steps are taken when `step` is called
            return tuple(tuple(work for work in stream if not isinstance(work, Step)) for stream in self._schedule(micros))
        return forward_only(Pipeline(self.layout.ranks, self.layout.holders, micros), self._loads)

    def _play(self, micros: Sequence[Micro], cells: Sequence[Cell], train: bool) -> dict[int, Score]:
        """Take micro-batches through the pipeline, and to `train` back, so that gradients wait for a step.

        Returns:
            scores of the micro-batches whose labels are here.
        """
        streams = self._streams(tuple(micros), train)
        stream = streams[self._me]
        self._stage.begin(cells, [state.tensors() for state in self._states], stream, train)
        transfers = Transfers(self._routes, streams, self._me, lambda m: torch.Size((*cells[m].batch.attention_mask.shape, self.model.config.hidden_size)),
                              self._dtype, self._device)

        before = self._busy_s
        self.pipe.play(stream, len(self.layout.chunks), self._stage, transfers, self._noted)
        if not train:
            self._busy_s = before
        for slot in {micro.client for micro in micros} if train else ():
            self._wait(slot, self._stage.grads[slot])
        return self._stage.scores()

    def _gradients(self, work: Sequence[StepBatches]) -> list[Sums]:
        begin = time.perf_counter()
        sums = self._gradients_together(work)
        self._pass_s += time.perf_counter() - begin
        return sums

    def _step(self, lr: float) -> list[bool]:
        begin = time.perf_counter()
        moved = self._step_together(lr)
        self._pass_s += time.perf_counter() - begin
        return moved

    @abstractmethod
    def _gradients_together(self, work: Sequence[StepBatches]) -> list[Sums]:
        """See `gradients`. Begins or ends with words from all ranks, so that waiting for the slowest is a part of it."""

    @abstractmethod
    def _step_together(self, lr: float) -> list[bool]:
        """See `step`."""

    def _step_waiting(self, lr: float) -> dict[int, bool]:
        """Take the steps whose gradients wait; by slot, whether it moved."""
        waiting, self._waiting, moved = self._waiting, {}, {}
        for slot in sorted(waiting):
            begin, state = time.perf_counter(), self._states[slot]
            with losses_named(f"in {Step(slot)}"):
                state.backward(hand_over(state, waiting[slot]))
                moved[slot] = state.step(lr)
            self._noted("step", f"step {slot}", begin, time.perf_counter())
        return moved

    def _noted(self, kind: str, name: str, begin: float, end: float) -> None:
        self._busy_s += end - begin if kind in ("compute", "step") else 0.0
        self._clock.trace.span(kind, name, begin, end)

    def take_bubble(self) -> tuple[float, float]:
        taken = self._pass_s - self._busy_s, self._pass_s
        self._busy_s = self._pass_s = 0.0
        return taken

    @property
    def base_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if not p.requires_grad)


class ClientPipeline(ClientPieces, PipelinedEngine):
    """One client's ranks, or those of clients that share them, whose micro-batches take turns. The torch world is these ranks. The first stage embeds, the last
    one holds the labels; every rank has all rows."""

    def __init__(self, net, states, groups, store, pipe, stage, layout, loads, clock):
        super().__init__(net, states, groups, None, store, pipe, stage, layout, loads, clock)
        self._steps = 0  # since the turn began

    def load(self, state, optimizer=None, *, frozen=frozenset(), seed=0, slot=0):
        super().load(state, optimizer, frozen=frozen, seed=seed, slot=slot)
        self._steps = 0

    def state(self, slot: int = 0) -> dict[str, torch.Tensor]:
        return self._whole(self._states[slot].state(), self._shapes)

    def optimizer_state(self, slot: int = 0) -> dict[str, torch.Tensor]:
        own = self._states[slot].optimizer_state()
        kinds = sorted({key.rpartition("/")[2] for key in own if "/" in key})
        whole = self._whole(own, {f"{name}/{kind}": shape for name, shape in self._shapes.items() for kind in kinds})
        return whole | {key: value for key, value in own.items() if "/" not in key}

    @losses_named("while a client's state was put together")
    def _whole(self, own: dict[str, torch.Tensor], shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
        """Every stage's tensors on all of them, on the CPU."""
        if not shapes:  # of an optimizer that remembers nothing
            return {}
        flat = torch.cat([own[name].reshape(-1) if name in own else torch.zeros(shape.numel()) for name, shape in shapes.items()]).to(self._device)
        dist.all_reduce(flat, group=self.groups.client)
        parts = flat.cpu().split([shape.numel() for shape in shapes.values()])
        return {name: part.view(shape).clone() for (name, shape), part in zip(shapes.items(), parts)}

    def _schedule(self, micros):
        clients, chunks = [micro.client for micro in micros], len(self.layout.chunks)
        return streamed(self.layout.ranks, chunks, clients) if self._loads else one_f_one_b(self.layout.ranks, clients)

    def _micro(self, slot: int) -> Micro:
        return Micro(slot, 0, self.layout.holders[-1])

    def _gradients_together(self, work: Sequence[StepBatches]) -> list[Sums]:
        with self._clock.stage("compute"):
            turns = taking_turns([len(step.micro) for step in work])
            cells = [self._cell(slot, i, work[slot]) for slot, i in turns]
            self._steps += 1
            scores = self._play([self._micro(slot) for slot, _ in turns], cells, train=True)
            sums = self._first([sum((Sums(s.loss, cells[m].batch.answer_tokens) for m, s in scores.items() if cells[m].owner == slot), Sums())
                                for slot in range(len(work))])
            get_accelerator().synchronize()
        return sums

    def _step_together(self, lr: float) -> list[bool]:
        with self._clock.stage("compute"):
            moved = self._step_waiting(lr)
            get_accelerator().synchronize()
        return list(moved.values())

    def _cell(self, slot: int, number: int, step: StepBatches) -> Cell:
        state = self._states[slot]
        return Cell(step.micro[number], slot, state.scaler.scale / max(1, step.step_answer_tokens),
                    seed=state.seed * 1_000_003 + self._steps * 1_009 + number)

    def evaluate(self, work: list[list[Batch]]) -> list[Sums]:
        sums = [Sums()] * len(work)
        with self._clock.stage("compute"):
            for portion in portions(work):
                scores = self._play([self._micro(0)] * len(portion), [Cell(batch, 0) for _, batch in portion], train=False)
                for m, score in scores.items():
                    i, batch = portion[m]
                    sums[i] += Sums(score.loss, batch.answer_tokens, score.exact, score.rows)
                activity.advance(len(portion))
            return self._first(sums)

    @losses_named("while losses were summed")
    def _first(self, sums: list[Sums]) -> list[Sums]:
        """The last stage's sums on the first one, which speaks for the clients; nothing elsewhere."""
        words = torch.tensor([[s.loss, s.tokens, s.exact, s.rows] for s in sums], dtype=torch.float64, device=self._device)
        dist.all_reduce(words, group=self.groups.client)
        return [Sums(w[0], *map(round, w[1:])) if self._me == 0 else Sums() for w in words.tolist()]

    def _idle_pass(self, backward: bool) -> None:
        raise AssertionError("a client's pipeline keeps step with nobody")


IDLE, TRAIN, STEP, EVALUATE, GATHER = range(5)  # what a pass of a cluster is


@dataclass(frozen=True)
class _Told:
    """A micro-batch as its owner tells the others: whose it is, its shape and padding, the seed of its dropout; no token and no label."""

    place: int  # among all seats of the cluster
    number: int
    seed: int
    width: int
    lengths: tuple[int, ...]

    def words(self) -> list[int]:
        return [self.place, self.number, self.seed, self.width, len(self.lengths), *self.lengths]

    def batch(self) -> Batch:
        shape = (len(self.lengths), self.width)
        mask = (np.arange(self.width) < np.array(self.lengths)[:, None]).astype(np.int64)
        return Batch(np.zeros(shape, np.int64), np.zeros(shape, np.int64), mask, 0)


@dataclass(frozen=True)
class _Header:
    """What a rank says before a pass. `places`: seats whose state its owner has loaded (or wants to know, in GATHER), with the seed of the turn. `lr`: of
    a STEP."""

    kind: int = IDLE
    places: tuple[tuple[int, int], ...] = ()
    micros: tuple[_Told, ...] = ()
    lr: float = 0.0

    def words(self) -> list[int]:
        return [self.kind, int(np.float64(self.lr).view(np.int64)), len(self.places), *(word for place in self.places for word in place),
                *(word for micro in self.micros for word in micro.words())]

    @classmethod
    def read(cls, words: Sequence[int]) -> "_Header":
        kind, lr, count, *_ = words
        at = 3 + 2 * count
        places, micros = tuple(zip(words[3:at:2], words[4:at:2])), []
        while at < len(words):
            place, number, seed, width, rows = words[at:at + 5]
            micros.append(_Told(place, number, seed, width, tuple(words[at + 5:at + 5 + rows])))
            at += 5 + rows
        return cls(kind, places, tuple(micros), float(np.int64(lr).view(np.float64)))


class ClusterPipeline(ClusterPieces, PipelinedEngine):
    """All clients of a cluster in one pipeline over all of its ranks. The first rank of each client embeds its micro-batches and holds its labels; every rank
    has a part of every client's adapter.

    Ranks act in passes that all of them make together. Each begins with a few words from everyone: who brings which micro-batches, and whose state is new.

    Args:
        owners: of all seats of the cluster, the rank whose data it is. mine: this rank's, by its own count.
        held: by rank, the names of the trainable tensors of its stage.
    """

    capabilities = frozenset({"gradients", "generate", "logprobs"})

    def __init__(self, net, states, groups, store, pipe, stage, layout, clock, owners: Sequence[int], mine: Sequence[int], held: Sequence[Sequence[str]]):
        super().__init__(net, states, groups, groups.cluster, store, pipe, stage, layout, False, clock)
        self._owners, self._mine, self._held = list(owners), list(mine), [list(names) for names in held]
        self._speaks = groups.client_rank == 0
        self._fresh: dict[int, tuple[dict, frozenset[str], int]] = {}  # own place -> what was loaded and not told yet
        self._seeds = [0] * len(self._mine)
        self._known: dict[int, dict[str, torch.Tensor]] = {}  # own place -> its whole state, while it stands
        self._steps = self._training = 0  # since the turn began; own slots whose gradients wait

    @property
    def client_slots(self) -> int:
        return len(self._mine)

    def train_passes(self, clients: int, steps: int, accumulation: int) -> int:
        return -(-clients // self.client_slots) * (2 * steps + 1)  # gradients and step apart, and one in which the states are told

    def load(self, state, optimizer=None, *, frozen=frozenset(), seed=0, slot=0):
        assert optimizer is None, "a cluster's pipeline keeps no optimizer (config/check.py)"
        place = self._mine[slot]
        self.load_folded(state)
        self._fresh[place], self._seeds[slot], self._steps = (trainable(state), frozen, seed), seed, 0
        self._waiting.pop(place, None)
        self._states[place].scaler.reset()  # losses are scaled before the states are told, with the scale that they will begin with
        self._known.pop(place, None)

    def state(self, slot: int = 0) -> dict[str, torch.Tensor]:
        place = self._mine[slot]
        if place in self._fresh:
            return {name: tensor.clone() for name, tensor in self._fresh[place][0].items()}
        if place not in self._known:
            self._pass(_Header(GATHER, tuple((p, 0) for p in self._mine if p not in self._fresh) if self._speaks else ()))
        return {name: tensor.clone() for name, tensor in self._known[place].items()}

    def optimizer_state(self, slot: int = 0):
        raise AssertionError("a cluster's pipeline keeps no optimizer (config/check.py)")

    def _schedule(self, micros):
        return shared(micros, self.layout.ranks)

    def add_to_gradients(self, slot: int, arrays, scale: float) -> None:
        raise AssertionError("a cluster's pipeline has no such capability: a client's gradients lie on others' ranks")

    def perturb(self, slot: int, seed: int, scale: float) -> None:
        raise AssertionError("a cluster's pipeline has no such capability: a client's masters lie on others' ranks")

    def _gradients_together(self, work: Sequence[StepBatches]) -> list[Sums]:
        with self._clock.stage("compute"):
            own = {(self._mine[slot], i): (batch, step) for slot, step in enumerate(work) for i, batch in enumerate(step.micro)} if self._speaks else {}
            told = tuple(_told(place, i, self._seeds[self._mine.index(place)] * 1_000_003 + self._steps * 1_009 + i, batch)
                         for (place, i), (batch, _) in own.items())
            self._steps += 1
            cells = {(place, i): Cell(batch, place, self._states[place].scaler.scale / max(1, step.step_answer_tokens))
                     for (place, i), (batch, step) in own.items()}
            scores, _ = self._pass(_Header(TRAIN, self._news(), told), cells)
            self._training = len(work)
            sums = [Sums()] * len(work)
            for (place, i), score in scores.items():
                sums[self._mine.index(place)] += Sums(score.loss, own[place, i][0].answer_tokens)
            get_accelerator().synchronize()
        return sums

    def _step_together(self, lr: float) -> list[bool]:
        with self._clock.stage("compute"):
            _, moved = self._pass(_Header(STEP, lr=lr))
            self._known.clear()
            get_accelerator().synchronize()
        return [moved.get(place, False) for place in self._mine[:self._training]]

    def evaluate(self, work: list[list[Batch]]) -> list[Sums]:
        sums, place = [Sums()] * len(work), self._mine[0]
        with self._clock.stage("compute"):
            for portion in portions(work):
                own = {(place, i): batch for i, (_, batch) in enumerate(portion)} if self._speaks else {}
                told = tuple(_told(place, i, 0, batch) for (_, i), batch in own.items())
                scores, _ = self._pass(_Header(EVALUATE, self._news(), told), {at: Cell(batch, place) for at, batch in own.items()})
                for (_, i), score in scores.items():
                    at, batch = portion[i]
                    sums[at] += Sums(score.loss, batch.answer_tokens, score.exact, score.rows)
                activity.advance(len(portion))
        return sums

    def _idle_pass(self, backward: bool) -> None:
        begin = time.perf_counter()
        self._pass(_Header(IDLE, self._news()))
        self._pass_s += time.perf_counter() - begin if backward else 0.0

    def _news(self) -> tuple[tuple[int, int], ...]:
        return tuple((place, seed) for place, (_, _, seed) in self._fresh.items()) if self._speaks else ()

    def _pass(self, mine: _Header, cells: dict | None = None):
        """One pass, together with all ranks. Returns ((place, number) -> score of own micro-batches, place -> whether it moved in a STEP)."""
        headers = self._everyones(mine)
        kind = max(header.kind for header in headers)
        assert all(header.kind in (IDLE, kind) for header in headers), f"ranks are at different passes: {[header.kind for header in headers]}"
        if kind == GATHER:
            self._gather([place for header in headers if header.kind == GATHER for place, _ in header.places])
            return {}, {}
        self._scatter([place for header in headers for place in header.places])
        if kind == STEP:
            return {}, self._step_waiting(max(header.lr for header in headers))
        told = sorted((micro for header in headers for micro in header.micros), key=lambda micro: (micro.number, micro.place))
        if not told:
            return {}, {}
        known, all_cells = cells or {}, []
        for micro in told:
            cell = known.get((micro.place, micro.number)) or Cell(micro.batch(), micro.place)
            all_cells.append(replace(cell, seed=micro.seed))
        micros = [Micro(micro.place, self._owners[micro.place], self._owners[micro.place]) for micro in told]
        scores = self._play(micros, all_cells, train=kind == TRAIN)
        return {(told[m].place, told[m].number): score for m, score in scores.items()}, {}

    @losses_named("while ranks agreed on a pass")
    def _everyones_integers(self, mine: list[int]) -> list[list[int]]:
        words = torch.tensor(mine, dtype=torch.int64)
        ranks = self.groups.cluster_size
        sizes = torch.zeros(ranks, dtype=torch.int64, device=self._device)
        dist.all_gather_into_tensor(sizes, torch.tensor([len(words)], device=self._device), group=self.groups.cluster)
        padded = torch.zeros(int(sizes.max()), dtype=torch.int64, device=self._device)
        padded[:len(words)] = words.to(self._device)
        whole = torch.zeros(ranks * len(padded), dtype=torch.int64, device=self._device)
        dist.all_gather_into_tensor(whole, padded, group=self.groups.cluster)
        return [row[:size].tolist() for row, size in zip(whole.cpu().view(ranks, -1), sizes.tolist())]

    def _everyones(self, mine: _Header) -> list[_Header]:
        return [_Header.read(words) for words in self._everyones_integers(mine.words())]

    # States. Each stage gets and gives its own part only.

    @losses_named("while stages were told states")
    def _scatter(self, places: list[tuple[int, int]]) -> None:
        """Load what owners have loaded, on every stage: values of its tensors, and which of them are frozen."""
        sends, receives = [], []
        for place, seed in places:
            owner = self._owners[place]
            if owner == self._me:
                state, frozen, _ = self._fresh[place]
                self._states[place].load(state, None, frozen, seed)
                for rank, names in enumerate(self._held):
                    if rank != self._me and names:
                        flat = torch.cat([*(state[n].reshape(-1).float() for n in names), torch.tensor([float(n in frozen) for n in names])]).to(self._device)
                        sends.append((flat, torch.distributed.isend(flat, rank, group=self._routes.group("activation", self._me, rank))))
            else:
                names = self._held[self._me]
                flat = torch.empty(sum(self._shapes[n].numel() for n in names) + len(names), device=self._device)
                receives.append((place, seed, flat, torch.distributed.irecv(flat, owner, group=self._routes.group("activation", owner, self._me))))
        for place, seed, flat, work in receives:
            work.wait(self._routes.deadline)
            names = self._held[self._me]
            values, flags = self._parted(flat.cpu(), names)
            self._states[place].load(values, None, frozenset(n for n, flag in zip(names, flags.tolist()) if flag), seed)
        for _, work in sends:
            work.wait(self._routes.deadline)
        self._fresh.clear()

    @losses_named("while stages told their states")
    def _gather(self, places: list[int]) -> None:
        """Tell owners the whole states of their clients; they tell their other ranks."""
        sends, receives = [], []
        for place in places:
            owner, names = self._owners[place], self._held[self._me]
            own = self._states[place].state()
            if owner == self._me:
                self._known[place] = dict(own)
                for rank, theirs in enumerate(self._held):
                    if rank != self._me and theirs:
                        flat = torch.empty(sum(self._shapes[n].numel() for n in theirs), device=self._device)
                        receives.append((place, theirs, flat, torch.distributed.irecv(flat, rank, group=self._routes.group("gradient", rank, self._me))))
            elif names:
                flat = torch.cat([own[n].reshape(-1) for n in names]).to(self._device)
                sends.append((flat, torch.distributed.isend(flat, owner, group=self._routes.group("gradient", self._me, owner))))
        for place, names, flat, work in receives:
            work.wait(self._routes.deadline)
            self._known[place] |= self._parted(flat.cpu(), names)[0]
        for _, work in sends:
            work.wait(self._routes.deadline)
        if self.groups.client_size > 1:
            for place in (place for place in places if place in self._mine):
                whole = self._known.get(place)
                flat = (torch.cat([whole[n].reshape(-1) for n in self._shapes]) if self._speaks else
                        torch.empty(sum(shape.numel() for shape in self._shapes.values()))).to(self._device)
                dist.broadcast(flat, self.groups.client_ranks[0], group=self.groups.client)
                self._known[place] = self._parted(flat.cpu(), list(self._shapes))[0]

    def _parted(self, flat: torch.Tensor, names: Sequence[str]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """({name: tensor} of what lies first in `flat`, the rest)."""
        sizes = [self._shapes[n].numel() for n in names]
        *parts, rest = flat.split([*sizes, len(flat) - sum(sizes)])
        return {n: part.view(self._shapes[n]).clone() for n, part in zip(names, parts)}, rest


def _told(place: int, number: int, seed: int, batch: Batch) -> _Told:
    return _Told(place, number, seed % 2**62, batch.input_ids.shape[1], tuple(int(n) for n in batch.attention_mask.sum(1)))
