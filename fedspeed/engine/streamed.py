"""The base in a store of its own, executed layer by layer; DeepSpeed engines hold what the seated clients train."""

import torch
from deepspeed.accelerator import get_accelerator

from fedspeed.data.batches import Batch, StepBatches
from fedspeed.engine.base.store import BaseStore
from fedspeed.engine.cell_model import Cell
from fedspeed.engine.client_engine import ClientEngine, Sums
from fedspeed.engine.client_state import ClientState
from fedspeed.engine.config import EVAL_TOKENS
from fedspeed.engine.layer_major import LayerMajor


class StreamedEngine(ClientEngine):
    """A seat for each client that trains at the same time. A pass takes all their micro-batches of one optimizer step through the model."""

    def __init__(self, model, states: list[ClientState], groups, store: BaseStore, layers: LayerMajor, clock):
        super().__init__(model, states, groups, store.matched, clock)
        self.store, self._layers = store, layers
        self._steps = 0  # since the turn began: dropout draws anew in every step

    def train_passes(self, clients: int, steps: int, accumulation: int) -> int:
        return -(-clients // self.seats) * steps

    def eval_passes(self, work: list[list[Batch]]) -> int:
        return len(portions(work))

    def load(self, state, optimizer=None, hold=frozenset(), seed=0, seat=0):
        super().load(state, optimizer, hold, seed, seat)
        self._steps = 0

    def _train_step(self, work: list[StepBatches], lr: float) -> list[Sums]:
        with self._clock.stage("compute"):
            cells = [self._cell(seat, i, batch, step) for seat, step in enumerate(work) for i, batch in enumerate(step.micro)]
            self._steps += 1
            scores, grads = self._layers.train(cells, [self._states[seat].named for seat in range(len(work))])
            sums = [Sums()] * len(work)
            for cell, score in zip(cells, scores):
                sums[cell.owner] += Sums(score.loss, cell.batch.answer_tokens)
            for seat in range(len(work)):
                state = self._states[seat]
                state.backward(hand_over(state, grads[seat]))
                sums[seat] += Sums(steps=int(state.step(lr)))
            get_accelerator().synchronize()  # the clock measures what was done, not what was asked for
        return sums

    def _cell(self, seat: int, number: int, batch: Batch, step: StepBatches) -> Cell:
        state = self._states[seat]
        scale = self.groups.client_size / max(1, step.step_answer_tokens) * state.scaler.scale
        return Cell(batch, seat, scale, seed=state.seed * 1_000_003 + self._steps * 1_009 + number)

    def evaluate(self, work: list[list[Batch]]) -> list[Sums]:
        sums, seat = [Sums()] * len(work), self._states[0].named
        for portion in portions(work):
            with self._clock.stage("compute"):
                scores = self._layers.evaluate([Cell(batch, 0) for _, batch in portion], [seat])
            for (i, batch), score in zip(portion, scores):
                sums[i] += Sums(score.loss, batch.answer_tokens, score.exact, score.rows)
        return sums

    def _idle_pass(self, backward: bool) -> None:
        if backward:
            self._layers.train([], [])
        else:
            self._layers.evaluate([], [])

    @property
    def base_bytes(self) -> int:
        return sum(piece.nbytes for unit in self.store.units for piece in unit.pieces)

    def _away(self):
        return self.store.away()

    def take_loaded(self) -> int:
        return sum(self.store.take_loads().bytes.values())

    def close(self) -> None:
        self.store.close()


def hand_over(state: ClientState, grads: dict[str, torch.Tensor]) -> torch.Tensor:
    """A loss whose backward gives the trainable parameters the gradients that the layers have computed, scaled as `state` wants them.

    So DeepSpeed reduces, clips, checks and applies them as it does its own.
    """
    return _HandOver.apply(state.scaler.scale, [grads[name] for name in state.named], *state.named.values())


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale, grads, *parameters):
        ctx.scale, ctx.grads, ctx.dtypes = scale, grads, [p.dtype for p in parameters]
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx, upward):
        factor = upward.float() / ctx.scale  # the gradients carry the loss scale already, and DeepSpeed multiplies by it
        return None, None, *((grad * factor).to(dtype) for grad, dtype in zip(ctx.grads, ctx.dtypes))


def portions(work: list[list[Batch]]) -> list[list[tuple[int, Batch]]]:
    """(list number, batch) of all batches in order, cut into passes of bounded size."""
    portions, tokens = [], EVAL_TOKENS
    for i, batches in enumerate(work):
        for batch in batches:
            if tokens + batch.input_ids.size > EVAL_TOKENS or not portions:
                portions.append([])
                tokens = 0
            portions[-1].append((i, batch))
            tokens += batch.input_ids.size
    return portions
