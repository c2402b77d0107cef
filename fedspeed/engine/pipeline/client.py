"""A pipeline over the ranks of one client, or of several clients that share their ranks and take turns."""

from collections.abc import Sequence

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedModel

from fedspeed import activity
from fedspeed.data.batches import Batch, StepBatches
from fedspeed.engine.client_engine import Sums, Tensors
from fedspeed.engine.client_state import ClientState
from fedspeed.engine.clock import Clock
from fedspeed.engine.compute.micro_batches import MicroBatchTask, seed_of
from fedspeed.engine.groups import Groups
from fedspeed.engine.pipeline.generation import ClientGeneration
from fedspeed.engine.pipeline.pipelined import PipelineParts
from fedspeed.engine.pipeline.transfers import naming_lost_ranks
from fedspeed.engine.store_engine import evaluation_passes
from fedspeed.schedule.instructions import Micro, Stream
from fedspeed.schedule.schedules import one_f_one_b, streamed, taking_turns


class ClientPipeline(ClientGeneration):
    """A client's pipeline. Its ranks form the torch world. The first stage embeds, the last one has the
    labels, and every rank has all rows.
    """

    kind = "client_pipeline"

    def __init__(
        self,
        model: PreTrainedModel,
        states: list[ClientState],
        groups: Groups,
        *,
        parts: PipelineParts,
        clock: Clock,
    ):
        super().__init__(model, states, groups, matched_group=None, parts=parts, clock=clock)
        self._steps = 0  # local steps since `load`

    def _load(
        self, slot: int, state: Tensors, optimizer: Tensors | None, frozen: frozenset[str], seed: int
    ) -> None:
        super()._load(slot, state, optimizer, frozen, seed)
        self._steps = 0

    def state(self, slot: int = 0) -> Tensors:
        return self._of_all_stages(self._states[slot].state(), self._shapes)

    def optimizer_state(self, slot: int = 0) -> Tensors:
        own = self._states[slot].optimizer_state()
        kinds = sorted({key.rpartition("/")[2] for key in own if "/" in key})
        shapes = {f"{name}/{kind}": shape for name, shape in self._shapes.items() for kind in kinds}
        steps = {key: value for key, value in own.items() if "/" not in key}
        return self._of_all_stages(own, shapes) | steps

    @naming_lost_ranks("while a client's state was put together")
    def _of_all_stages(self, own: Tensors, shapes: dict[str, torch.Size]) -> Tensors:
        """Return the tensors of all stages on the CPU, given this stage's. Collective over the client."""
        if not shapes:  # an optimizer without state
            return {}
        flat = torch.cat([
            own[name].reshape(-1) if name in own else torch.zeros(shape.numel())
            for name, shape in shapes.items()
        ]).to(self._device)
        dist.all_reduce(flat, group=self.groups.client)
        parts = flat.cpu().split([shape.numel() for shape in shapes.values()])
        return {name: part.view(shape).clone() for (name, shape), part in zip(shapes.items(), parts)}

    def _schedule(self, micros: tuple[Micro, ...]) -> tuple[Stream, ...]:
        clients = [micro.client for micro in micros]
        if self._loads:
            return streamed(self.layout.ranks, len(self.layout.chunks), clients)
        return one_f_one_b(self.layout.ranks, clients)

    def _micro(self, slot: int) -> Micro:
        return Micro(slot, 0, self.layout.holders[-1])

    def _gradients_together(self, work: Sequence[StepBatches]) -> list[Sums]:
        with self._clock.stage("compute"):
            order = taking_turns([len(step.micro) for step in work])
            tasks = [self._task(slot, i, work[slot]) for slot, i in order]
            self._steps += 1
            scores = self._play([self._micro(slot) for slot, _ in order], tasks, train=True)
            sums = [Sums()] * len(work)
            for m, score in scores.items():
                sums[tasks[m].owner] += Sums(score.loss, tasks[m].batch.answer_tokens)
            sums = self._on_first_stage(sums)
            get_accelerator().synchronize()
        return sums

    def _step_together(self, slots: Sequence[int], lr: float) -> list[bool]:
        with self._clock.stage("compute"):
            applied = self._play_steps(slots, lr)
            get_accelerator().synchronize()
        return applied

    def _task(self, slot: int, number: int, step: StepBatches) -> MicroBatchTask:
        state = self._states[slot]
        scale = state.scaler.scale / max(1, step.step_answer_tokens)
        return MicroBatchTask(step.micro[number], slot, scale, seed_of(state.seed, self._steps, number))

    def evaluate(self, work: list[list[Batch]]) -> list[Sums]:
        sums = [Sums()] * len(work)
        with self._clock.stage("compute"):
            for batches in evaluation_passes(work):
                tasks = [MicroBatchTask(batch, 0) for _, batch in batches]
                scores = self._play([self._micro(0)] * len(batches), tasks, train=False)
                for m, score in scores.items():
                    i, batch = batches[m]
                    sums[i] += Sums(score.loss, batch.answer_tokens, score.exact, score.rows)
                activity.advance(len(batches))
            return self._on_first_stage(sums)

    @naming_lost_ranks("while losses were summed")
    def _on_first_stage(self, sums: list[Sums]) -> list[Sums]:
        """Return the last stage's sums on the first stage, which is the client's gateway, and zeros on the
        others.
        """
        table = torch.tensor(
            [[s.loss, s.tokens, s.exact, s.rows] for s in sums], dtype=torch.float64, device=self._device
        )
        dist.all_reduce(table, group=self.groups.client)
        return [Sums(row[0], *map(round, row[1:])) if self._rank == 0 else Sums() for row in table.tolist()]

    def _idle_pass(self, backward: bool) -> None:
        raise AssertionError("the passes of a client's pipeline are not matched with other ranks")
