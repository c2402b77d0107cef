"""Align a student with its teacher, where the student is the same model with fewer blocks.

Both begin with the embedding and end with the same blocks, the common ones. Before these, the teacher
computes all blocks and the student only some. The LoRA of the student's own blocks is off for the teacher,
and the only thing that trains; the common blocks have theirs in both. With h*, h [hidden] a token's inputs of
the common blocks, and p*, p what teacher and student predict after it, the loss of a step is

    mean over tokens of |h* - h|^2 / |h*|^2  +  kl * mean over tokens of KL(p* || p).

The first term is the mean of ((h* - h) / rms(h*))^2, with the root mean square of each token's own h*, so
that the loss of a token does not depend on which others are in its batch. All tokens count alike, prompt and
answer; padding does not.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from fedspeed.data.batches import Batch, StepBatches
from fedspeed.engine.client_state import ClientState
from fedspeed.engine.compute.micro_batches import Call, MicroBatchModel, MicroBatchTask
from fedspeed.engine.distil_sums import DistilSums
from fedspeed.models.blocks import anatomy

KL_COPIES = 6  # fp32 tensors of the logits' size that exist while the divergence is differentiated


class _Outputs(NamedTuple):
    """What teacher or student makes of a micro-batch, at its tokens.

    Attributes:
        hidden: input of the common blocks, [tokens, hidden].
        normed: the final norm's output, [tokens, hidden]; None where the divergence is not asked for.
    """

    hidden: torch.Tensor
    normed: torch.Tensor | None


def token_count(step: StepBatches) -> int:
    """Return the number of tokens of a rank's micro-batches, without padding."""
    return sum(int(batch.attention_mask.sum()) for batch in step.micro)


class Distillation:
    """Computes the loss of a student and its gradients, on one rank, with all blocks in its memory.

    Args:
        model: as built, with LoRA on the student's own blocks.
        student: numbers of the blocks that the student computes before the common ones, in ascending order.
        common: number of the first common block. kl: weight of the divergence in the loss; 0: it is not
            computed.
    """

    def __init__(self, model: PreTrainedModel, *, student: Sequence[int], common: int, kl: float):
        parts = anatomy(model)
        depth = len(parts.blocks)
        assert list(student) == sorted(set(student)) and 0 <= student[0] <= student[-1] < common < depth, (
            f"a student of blocks {list(student)} before block {common} of {depth}"
        )
        self._model = model
        self._parts = parts
        self._student = tuple(student)
        self._common = range(common, depth)
        self._kl = kl
        self._micro_batches = MicroBatchModel(model, parts)

    def accumulate(self, state: ClientState, step: StepBatches, *, tokens: int, ranks: int) -> DistilSums:
        """Compute the gradients of a step's loss, and add them to those of a client slot; return this rank's
        sums.

        Args:
            state: the slot, whose trainable tensors are the model's. Those that it freezes, such as the
                common blocks' LoRA, get gradients of zero.
            tokens: of the whole step, over all ranks (see `token_count`). ranks: their number: DeepSpeed
                averages the gradients over them.
        """
        total = DistilSums()
        for batch in step.micro:
            # From the generator that `ClientEngine.load` has seeded, so that every step has its own masks.
            task = MicroBatchTask(batch, owner=0, seed=int(torch.randint(2**31, ())))
            loss, sums = self._loss(task, factor=ranks / tokens, loss_scale=state.scaler.scale)
            state.backward(loss)
            total += sums
        return total

    def _loss(
        self, task: MicroBatchTask, *, factor: float, loss_scale: float
    ) -> tuple[torch.Tensor, DistilSums]:
        """Return (a loss whose gradients are those of `factor` times the summed loss, the sums).

        Args:
            loss_scale: what the loss is multiplied by before it is differentiated.
        """
        at = _positions(task.batch, self._micro_batches.device)
        with torch.no_grad(), self._as_teacher():
            entered, calls = self._micro_batches.enter(task, self._parts.embedding.weight)
            teacher = self._compute(range(self._common.start), task, calls, entered, at=at)
        student = self._compute(self._student, task, calls, entered, at=at)
        hidden = _relative_error(teacher.hidden, student.hidden)
        loss = hidden * factor
        kl = 0.0
        if teacher.normed is not None and student.normed is not None:
            kl, downward = self._divergence(teacher.normed, student.normed, factor * self._kl * loss_scale)
            # The divergence has been differentiated piece by piece, so that not all logits exist at a time.
            loss = loss + (student.normed.float() * (downward / loss_scale)).sum()
        return loss, DistilSums(hidden.item(), kl, len(at))

    def _compute(
        self,
        blocks: Sequence[int],
        task: MicroBatchTask,
        calls: Sequence[Call],
        entered: torch.Tensor,
        *,
        at: torch.Tensor,
    ) -> _Outputs:
        """Compute some blocks, and the common ones if their output is needed.

        Args:
            blocks: before the common ones. calls, entered: see `MicroBatchModel.enter`.
            at: positions of the tokens in the flat batch.
        """
        x = entered
        for b in blocks:
            x = self._micro_batches.block(b, task, calls, x)
        hidden = _rows(x, at)
        if not self._kl:
            return _Outputs(hidden, None)
        for b in self._common:
            x = self._micro_batches.block(b, task, calls, x)
        return _Outputs(hidden, _rows(self._parts.norm(x), at))

    def _divergence(
        self, teacher: torch.Tensor, student: torch.Tensor, scale: float
    ) -> tuple[float, torch.Tensor]:
        """Return (the sum of the tokens' divergences, the gradient of `scale` times it by `student`, in
        fp32).

        Args:
            teacher, student: outputs of the final norm, [tokens, hidden].
        """
        total = 0.0
        downward = torch.empty(student.shape, dtype=torch.float32, device=student.device)
        for part in self._micro_batches.pieces(student, value_bytes=4 * KL_COPIES):
            with torch.no_grad():
                target = self._log_probabilities(teacher[part])
            piece = student[part].detach().requires_grad_()
            with torch.enable_grad():
                found = self._log_probabilities(piece)
                lost = nn.functional.kl_div(found, target, reduction="sum", log_target=True)
                (gradient,) = torch.autograd.grad(lost * scale, piece)
            downward[part] = gradient
            total += lost.item()
        return total, downward

    def _log_probabilities(self, normed: torch.Tensor) -> torch.Tensor:
        """Return fp32 log-probabilities of all next tokens [tokens, vocabulary]."""
        return self._micro_batches.logits(normed).float().log_softmax(-1)

    @contextmanager
    def _as_teacher(self) -> Iterator[None]:
        """Compute without dropout, and with the LoRA of all blocks before the common ones off."""
        layers = [layer for b in range(self._common.start) for layer in _lora_layers(self._parts.blocks[b])]
        scales = [dict(layer.scaling) for layer in layers]
        training = self._model.training
        self._model.eval()
        for layer in layers:
            layer.scaling.update(dict.fromkeys(layer.scaling, 0.0))
        try:
            yield
        finally:
            for layer, scale in zip(layers, scales):
                layer.scaling.update(scale)
            self._model.train(training)


def _lora_layers(block: nn.Module) -> list:
    """Return the modules of a block that have a PEFT LoRA."""
    from peft.tuners.lora import LoraLayer

    return [module for module in block.modules() if isinstance(module, LoraLayer)]


def _positions(batch: Batch, device: torch.device) -> torch.Tensor:
    """Return the positions of a batch's tokens, without padding, in the flat batch: [tokens] int64."""
    return torch.from_numpy(batch.attention_mask.reshape(-1).nonzero()[0]).to(device)


def _rows(values: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Return some rows [tokens, hidden] of values [B, T, hidden]."""
    return values.flatten(0, 1).index_select(0, at)


def _relative_error(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Return the sum over tokens of |teacher - student|^2 / |teacher|^2, a scalar in fp32.

    Args:
        teacher, student: [tokens, hidden].
    """
    target = teacher.float()
    squares = (target - student.float()).square().sum(-1)
    return (squares / target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)).sum()
