"""Engines whose model lies across ranks: a client's pipeline over its own ranks, and a cluster's over the ranks of all its clients."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from fedspeed.data.batches import Batch, StepBatches
from fedspeed.engine.base.store import BaseStore
from fedspeed.engine.cell_model import Cell, Score
from fedspeed.engine.client_engine import ClientEngine, Sums
from fedspeed.engine.client_state import ClientState
from fedspeed.engine.groups import Groups, world_deadline
from fedspeed.engine.pipeline.engine import FederatedPipelineEngine
from fedspeed.engine.pipeline.stage import Stage
from fedspeed.engine.pipeline.transfers import Routes, Transfers
from fedspeed.engine.streamed import hand_over, portions
from fedspeed.planner.pipeline.instructions import Micro, Pipeline, Stream
from fedspeed.planner.pipeline.layout import Layout
from fedspeed.planner.pipeline.schedules import forward_only, one_f_one_b, streamed, taking_turns

SCHEDULES = 64  # kept, by what they were made for


class PipelinedEngine(ClientEngine):
    """What both have in common. Every rank of the torch world is a stage; it holds the trainable tensors of its blocks, for every client that trains there.

    Args:
        states: of this stage, one for each client that trains at the same time.
        loads: whether chunks are loaded and released.
    """

    def __init__(self, net, states: list[ClientState], groups: Groups, matched, store: BaseStore, pipe: FederatedPipelineEngine, stage: Stage, layout: Layout,
                 loads: bool, clock):
        super().__init__(net, states, groups, matched, clock)
        self.store, self.pipe, self.layout = store, pipe, layout
        self._stage, self._loads, self._me = stage, loads, dist.get_rank()
        self._routes = Routes(world_deadline())
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
        if train:
            return self._schedule(micros)
        return forward_only(Pipeline(self.layout.ranks, self.layout.holders, micros), self._loads)

    def _play(self, micros: Sequence[Micro], cells: Sequence[Cell], lr: float | None) -> tuple[dict[int, Score], dict[int, bool]]:
        """Take micro-batches through the pipeline, and back if there is a rate `lr` to step with.

        Returns:
            (scores of the micro-batches whose labels are here, whether each client's step was taken).
        """
        taken: dict[int, bool] = {}
        streams = self._streams(tuple(micros), lr is not None)
        stream = streams[self._me]
        self._stage.begin(cells, [state.named for state in self._states], stream, lr is not None)
        transfers = Transfers(self._routes, streams, self._me, lambda m: torch.Size((*cells[m].batch.attention_mask.shape, self.model.config.hidden_size)),
                              self._dtype, self._device)

        def step(seat: int) -> None:
            state = self._states[seat]
            state.backward(hand_over(state, self._stage.grads[seat]))
            taken[seat] = state.step(lr)

        self.pipe.play(stream, len(self.layout.chunks), self._stage, transfers, step)
        return self._stage.scores(), taken

    def train_passes(self, clients: int, steps: int, accumulation: int) -> int:
        return -(-clients // self.seats) * steps

    def eval_passes(self, work: list[list[Batch]]) -> int:
        return len(portions(work))

    @property
    def base_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if not p.requires_grad)

    def _away(self):
        return self.store.away()

    def take_loaded(self) -> int:
        return sum(self.store.take_loads().bytes.values())

    def close(self) -> None:
        self.store.close()


class ClientPipeline(PipelinedEngine):
    """One client's ranks, or those of clients that share them, whose micro-batches take turns. The torch world is these ranks. The first stage embeds, the last
    one holds the labels; every rank has all rows."""

    def __init__(self, net, states, groups, store, pipe, stage, layout, loads, clock):
        super().__init__(net, states, groups, None, store, pipe, stage, layout, loads, clock)
        self._steps = 0  # since the turn began

    def load(self, state, optimizer=None, hold=frozenset(), seed=0, seat=0):
        super().load(state, optimizer, hold, seed, seat)
        self._steps = 0

    def state(self, seat: int = 0) -> dict[str, torch.Tensor]:
        return self._whole(self._states[seat].state(), self._shapes)

    def optimizer_state(self, seat: int = 0) -> dict[str, torch.Tensor]:
        own = self._states[seat].optimizer_state()
        kinds = sorted({key.rpartition("/")[2] for key in own if "/" in key})
        whole = self._whole(own, {f"{name}/{kind}": shape for name, shape in self._shapes.items() for kind in kinds})
        return whole | {key: value for key, value in own.items() if "/" not in key}

    def _whole(self, own: dict[str, torch.Tensor], shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
        """Every stage's tensors on all of them, on the CPU."""
        flat = torch.cat([own[name].reshape(-1) if name in own else torch.zeros(shape.numel()) for name, shape in shapes.items()]).to(self._device)
        dist.all_reduce(flat, group=self.groups.client)
        parts = flat.cpu().split([shape.numel() for shape in shapes.values()])
        return {name: part.view(shape).clone() for (name, shape), part in zip(shapes.items(), parts)}

    def _schedule(self, micros):
        clients, chunks = [micro.client for micro in micros], len(self.layout.chunks)
        return streamed(self.layout.ranks, chunks, clients) if self._loads else one_f_one_b(self.layout.ranks, clients)

    def _micro(self, seat: int) -> Micro:
        return Micro(seat, 0, self.layout.holders[-1])

    def _train_step(self, work: list[StepBatches], lr: float) -> list[Sums]:
        with self._clock.stage("compute"):
            turns = taking_turns([len(step.micro) for step in work])
            cells = [self._cell(seat, i, work[seat]) for seat, i in turns]
            self._steps += 1
            scores, taken = self._play([self._micro(seat) for seat, _ in turns], cells, lr)
            sums = self._first([sum((Sums(s.loss, cells[m].batch.answer_tokens) for m, s in scores.items() if cells[m].owner == seat), Sums())
                                for seat in range(len(work))])
            get_accelerator().synchronize()
        return [one + Sums(steps=int(taken[seat])) for seat, one in enumerate(sums)]

    def _cell(self, seat: int, number: int, step: StepBatches) -> Cell:
        state = self._states[seat]
        return Cell(step.micro[number], seat, state.scaler.scale / max(1, step.step_answer_tokens),
                    seed=state.seed * 1_000_003 + self._steps * 1_009 + number)

    def evaluate(self, work: list[list[Batch]]) -> list[Sums]:
        sums = [Sums()] * len(work)
        with self._clock.stage("compute"):
            for portion in portions(work):
                scores, _ = self._play([self._micro(0)] * len(portion), [Cell(batch, 0) for _, batch in portion], None)
                for m, score in scores.items():
                    i, batch = portion[m]
                    sums[i] += Sums(score.loss, batch.answer_tokens, score.exact, score.rows)
            return self._first(sums)

    def _first(self, sums: list[Sums]) -> list[Sums]:
        """The last stage's sums on the first one, which speaks for the clients; nothing elsewhere."""
        words = torch.tensor([[s.loss, s.tokens, s.exact, s.rows] for s in sums], dtype=torch.float64, device=self._device)
        dist.all_reduce(words, group=self.groups.client)
        return [Sums(w[0], *map(round, w[1:])) if self._me == 0 else Sums() for w in words.tolist()]

    def _idle_pass(self, backward: bool) -> None:
        raise AssertionError("a client's pipeline keeps step with nobody")

