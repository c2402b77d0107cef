"""A client's pipeline over its own ranks, or over those of clients that share them, whose micro-batches take
turns.
"""

from collections.abc import Sequence

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from fedspeed import activity
from fedspeed.data.batches import Batch, StepBatches
from fedspeed.engine.client_engine import Sums
from fedspeed.engine.compute.micro_batches import MicroBatchTask, seed_of
from fedspeed.engine.pipeline.generation import ClientGeneration
from fedspeed.engine.pipeline.pipelined import PipelinedEngine
from fedspeed.engine.pipeline.transfers import naming_lost_ranks
from fedspeed.engine.store_engine import evaluation_passes
from fedspeed.schedule.instructions import Micro
from fedspeed.schedule.schedules import one_f_one_b, streamed, taking_turns


class ClientPipeline(ClientGeneration, PipelinedEngine):
    """The torch world is these ranks. The first stage embeds, the last one holds the labels; every rank has
    all rows.
    """

    kind = "client_pipeline"

    def __init__(self, net, states, groups, **parts):
        super().__init__(net, states, groups, matched_group=None, **parts)
        self._steps = 0  # since the turn began

    def _load(self, slot, state, optimizer, frozen, seed):
        super()._load(slot, state, optimizer, frozen, seed)
        self._steps = 0

    def state(self, slot: int = 0) -> dict[str, torch.Tensor]:
        return self._whole(self._states[slot].state(), self._shapes)

    def optimizer_state(self, slot: int = 0) -> dict[str, torch.Tensor]:
        own = self._states[slot].optimizer_state()
        kinds = sorted({key.rpartition("/")[2] for key in own if "/" in key})
        shapes = {f"{name}/{kind}": shape for name, shape in self._shapes.items() for kind in kinds}
        return self._whole(own, shapes) | {key: value for key, value in own.items() if "/" not in key}

    @naming_lost_ranks("while a client's state was put together")
    def _whole(self, own: dict[str, torch.Tensor], shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
        """Every stage's tensors on all of them, on the CPU."""
        if not shapes:  # of an optimizer that remembers nothing
            return {}
        flat = torch.cat([
            own[name].reshape(-1) if name in own else torch.zeros(shape.numel())
            for name, shape in shapes.items()
        ]).to(self._device)
        dist.all_reduce(flat, group=self.groups.client)
        parts = flat.cpu().split([shape.numel() for shape in shapes.values()])
        return {name: part.view(shape).clone() for (name, shape), part in zip(shapes.items(), parts)}

    def _schedule(self, micros):
        clients = [micro.client for micro in micros]
        chunks = len(self.layout.chunks)
        if self._loads:
            return streamed(self.layout.ranks, chunks, clients)
        return one_f_one_b(self.layout.ranks, clients)

    def _micro(self, slot: int) -> Micro:
        return Micro(slot, 0, self.layout.holders[-1])

    def _gradients_together(self, work: Sequence[StepBatches]) -> list[Sums]:
        with self._clock.stage("compute"):
            turns = taking_turns([len(step.micro) for step in work])
            tasks = [self._task(slot, i, work[slot]) for slot, i in turns]
            self._steps += 1
            scores = self._play([self._micro(slot) for slot, _ in turns], tasks, train=True)
            sums = [Sums()] * len(work)
            for m, score in scores.items():
                sums[tasks[m].owner] += Sums(score.loss, tasks[m].batch.answer_tokens)
            sums = self._first(sums)
            get_accelerator().synchronize()
        return sums

    def _step_together(self, slots: Sequence[int], lr: float) -> list[bool]:
        with self._clock.stage("compute"):
            moved = self._play_steps(slots, lr)
            get_accelerator().synchronize()
        return moved

    def _task(self, slot: int, number: int, step: StepBatches) -> MicroBatchTask:
        state = self._states[slot]
        scale = state.scaler.scale / max(1, step.step_answer_tokens)
        return MicroBatchTask(step.micro[number], slot, scale, seed_of(state.seed, self._steps, number))

    def evaluate(self, work: list[list[Batch]]) -> list[Sums]:
        sums = [Sums()] * len(work)
        with self._clock.stage("compute"):
            for portion in evaluation_passes(work):
                scores = self._play(
                    [self._micro(0)] * len(portion),
                    [MicroBatchTask(batch, 0) for _, batch in portion],
                    train=False,
                )
                for m, score in scores.items():
                    i, batch = portion[m]
                    sums[i] += Sums(score.loss, batch.answer_tokens, score.exact, score.rows)
                activity.advance(len(portion))
            return self._first(sums)

    @naming_lost_ranks("while losses were summed")
    def _first(self, sums: list[Sums]) -> list[Sums]:
        """The last stage's sums on the first one, which speaks for the clients; nothing elsewhere."""
        table = torch.tensor(
            [[s.loss, s.tokens, s.exact, s.rows] for s in sums], dtype=torch.float64, device=self._device
        )
        dist.all_reduce(table, group=self.groups.client)
        return [Sums(row[0], *map(round, row[1:])) if self._me == 0 else Sums() for row in table.tolist()]

    def _idle_pass(self, backward: bool) -> None:
        raise AssertionError("a client's pipeline keeps step with nobody")
