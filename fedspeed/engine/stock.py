"""An engine in which DeepSpeed executes the model, one micro-batch at a time, under any ZeRO stage."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import GatheredParameters
from torch import nn

from fedspeed import activity
from fedspeed.data.batches import Batch, StepBatches
from fedspeed.engine.client_engine import ClientEngine, ForwardDerivatives, Sums, Tensors
from fedspeed.engine.client_state import ClientState
from fedspeed.engine.clock import Clock
from fedspeed.engine.compute.micro_batches import check_padding
from fedspeed.engine.distil_sums import DistilSums
from fedspeed.engine.distillation import Distillation, token_count
from fedspeed.engine.forward_mode import AnswerLoss, loss_along, tangents_of
from fedspeed.engine.generation.pieces import Piece
from fedspeed.engine.generation.stock import compute_piece
from fedspeed.engine.groups import Groups
from fedspeed.engine.masters import whole_parameters
from fedspeed.engine.surrogate_loss import surrogate_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

IDLE = np.zeros((1, 8), dtype=np.int64)


class StockEngine(ClientEngine):
    """An engine with one client slot. A pass is the forward (and backward) pass of one micro-batch."""

    kind = "stock"

    def __init__(
        self, ds_engine: DeepSpeedEngine, groups: Groups, matched_group: "ProcessGroup | None", clock: Clock
    ):
        named = {n: p for n, p in sorted(ds_engine.module.named_parameters()) if p.requires_grad}
        super().__init__(
            ds_engine.module,
            [ClientState(ds_engine, whole_parameters(named), groups)],
            groups,
            matched_group,
            clock,
        )
        self.ds_engine = ds_engine

    def train_passes(
        self, clients: int, steps: int, accumulation: int, *, gradients: int = 1, reads: int = 0
    ) -> int:
        return clients * steps * gradients * accumulation

    def eval_passes(self, work: list[list[Batch]]) -> int:
        return sum(len(batches) for batches in work)

    def _load(
        self, slot: int, state: Tensors, optimizer: Tensors | None, frozen: frozenset[str], seed: int
    ) -> None:
        super()._load(slot, state, optimizer, frozen, seed)
        torch.manual_seed(seed)

    def _drop_gradients(self, slot: int) -> None:
        self._states[slot].step(0.0)  # DeepSpeed has no other way to drop gradients that it has reduced

    def _gradients(self, work: Sequence[StepBatches]) -> list[Sums]:
        (step,) = work
        (state,) = self._states
        total = Sums()
        self.ds_engine.train()
        with self._clock.stage("compute"):
            for batch in step.micro:
                self._count_pass()
                loss_sum, _ = self._loss(batch)
                state.backward(loss_sum * (self.groups.client_size / max(1, step.step_answer_tokens)))
                total += Sums(loss_sum.item(), batch.answer_tokens)
            get_accelerator().synchronize()  # so that the clock includes work that is still queued
        return [total]

    def distil(self, work: StepBatches, *, student: Sequence[int], common: int, kl: float) -> DistilSums:
        assert self.ds_engine.zero_optimization_stage() < 3, "distil computes with whole parameters"
        mine = np.array([float(token_count(work))])
        tokens = int(self.sum_over_client(mine)[0])
        self.ds_engine.train()
        with self.measured(), self._clock.stage("compute"):
            distillation = Distillation(self.model, student=student, common=common, kl=kl)
            sums = distillation.accumulate(
                self._states[0], work, tokens=tokens, ranks=self.groups.client_size
            )
            get_accelerator().synchronize()
        self._pending.add(0)
        return sums

    def _forward_gradients(
        self, slot: int, step: StepBatches, seeds: Sequence[int], names: frozenset[str]
    ) -> ForwardDerivatives:
        accelerator = get_accelerator()
        values = {name: value for name, value in self._states[slot].tensors().items() if name in names}
        loss = AnswerLoss(self.model, self._logit_rows)
        found = np.zeros((len(seeds), len(step.micro), 2))  # (loss, derivative)
        self.ds_engine.train()
        begun = accelerator.get_rng_state()
        with self._clock.stage("compute"):
            for k, seed in enumerate(seeds):
                accelerator.set_rng_state(begun)
                tangents = tangents_of(values, seed)
                for i, batch in enumerate(step.micro):
                    self._count_pass()
                    found[k, i] = [part.item() for part in loss_along(loss, batch, values, tangents)]
        tokens = sum(batch.answer_tokens for batch in step.micro)
        derivatives = self.sum_over_client(found[:, :, 1].sum(axis=1) / max(1, step.step_answer_tokens))
        return ForwardDerivatives(Sums(float(found[0, :, 0].sum()), tokens), derivatives)

    def _add_to_gradients(self, slot: int, arrays: Mapping[str, np.ndarray], scale: float) -> None:
        state = self._states[slot]
        factor = scale * state.scaler.scale
        grads = {
            name: torch.from_numpy(np.asarray(array, np.float32)).to(self._device) * factor
            for name, array in arrays.items()
        }
        partitioned = self.ds_engine.zero_optimization_stage() == 3
        # A parameter that ZeRO-3 has partitioned accepts a gradient of its shape only while it is gathered.
        with GatheredParameters(state.parameters, enabled=partitioned):
            state.backward(surrogate_loss(state, grads))

    def _step(self, slots: Sequence[int], lr: float) -> list[bool]:
        with self._clock.stage("compute"):
            applied = [self._states[slot].step(lr) for slot in slots]
            get_accelerator().synchronize()
        return applied

    @torch.no_grad()
    def evaluate(self, work: list[list[Batch]]) -> list[Sums]:
        self.ds_engine.eval()
        return [sum((self._evaluate(batch) for batch in batches), Sums()) for batches in work]

    def _evaluate(self, batch: Batch) -> Sums:
        assert batch.position_ids is None, "rows that are counted must not be packed"
        self._count_pass()
        with self._clock.stage("compute"):
            loss_sum, logits = self._loss(batch)
            labels = self._tensor(batch.labels)[:, 1:]
            right = (logits[:, :-1].argmax(-1) == labels) | (labels == -100)
            rows = (labels != -100).any(dim=1)
            exact = right.all(dim=1) & rows
            exact[list(batch.cut)] = False
            sums = Sums(loss_sum.item(), batch.answer_tokens, int(exact.sum()), int(rows.sum()))
            self._end_forward_only()
        activity.advance()
        return sums

    def piece_passes(self, pieces: Sequence[Piece]) -> int:
        return len(pieces)

    @torch.no_grad()
    def compute_pieces(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        if not pieces:
            self._idle_pass(backward=False)
        self.ds_engine.eval()
        found = []
        for piece in pieces:
            found.append(
                compute_piece(
                    self.ds_engine,
                    self.model.config,
                    piece,
                    dtype=self._computing_dtype,
                    device=self._device,
                    rows=self._logit_rows,
                )
            )
            self._end_forward_only()
        return found

    @property
    def base_bytes(self) -> int:
        return sum(
            getattr(p, "ds_numel", p.numel()) * p.element_size()
            for p in self.model.parameters()
            if not p.requires_grad
        )

    def _away(self) -> list[torch.Tensor]:
        """Return what ZeRO-3 offloads: shards in RAM, and the buffers for tensors that are swapped to
        NVMe.
        """
        offloaded = []
        offloads = self.ds_engine.zero_offload_param() is not None
        for parameter in self.ds_engine.module.parameters():
            shard = getattr(parameter, "ds_tensor", None)
            if shard is not None and offloads:
                offloaded.append(shard)
            if (swapper := getattr(parameter, "nvme_swapper", None)) is not None:
                offloaded.append(swapper.buffers)
        return offloaded

    def _idle_pass(self, backward: bool) -> None:
        """Make a pass whose loss is multiplied by zero, so that its gradient is exactly zero."""
        batch = Batch(input_ids=IDLE, labels=IDLE, attention_mask=np.ones_like(IDLE), answer_tokens=0)
        if backward:
            self.ds_engine.train()
            self._states[0].backward(self._loss(batch)[0] * 0.0)
        else:
            self.ds_engine.eval()
            with torch.no_grad():
                self._loss(batch)
            self._end_forward_only()

    def _end_forward_only(self) -> None:
        """Drop what a forward pass has prefetched for a backward pass that does not follow. Ranks with
        matched passes do this together, since it comes after each of them.
        """
        if self.ds_engine.zero_optimization_stage() == 3:
            self.ds_engine.optimizer.empty_partition_cache()

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(array, dtype=np.int64)).to(self._device)

    def _loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (sum of the answer tokens' cross-entropy in fp32, logits [batch, tokens, vocabulary])."""
        check_padding(batch)
        # transformers sees from the positions which rows are packed into one sequence.
        packed = {} if batch.position_ids is None else {"position_ids": self._tensor(batch.position_ids)}
        logits = self.ds_engine(input_ids=self._tensor(batch.input_ids), attention_mask=None, **packed).logits
        labels = self._tensor(batch.labels)[:, 1:]
        loss = nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        return loss, logits
