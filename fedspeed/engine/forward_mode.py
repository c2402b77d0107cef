"""Forward-mode differentiation: the derivative of a loss along a direction of the trainable tensors, computed
in one forward pass that saves no activations.

Each tensor that depends on the direction is a dual number: its value, and a tangent of the same shape. The
memory is that of the live part of a forward pass, with tangents from the first tensor that the direction
changes on.

B: sequences of a micro-batch, T: padded length, n: answer tokens.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedspeed.data.batches import Batch
from fedspeed.engine.compute.micro_batches import answer_tokens, check_padding
from fedspeed.engine.directions import direction
from fedspeed.errors import ModelError
from fedspeed.models.blocks import anatomy

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Tensors = Mapping[str, torch.Tensor]


class AnswerLoss(nn.Module):
    """The cross-entropy of a micro-batch's answer tokens, as a function of a model's parameters.

    Args:
        rows: number of tokens whose logits are in memory at once.
    """

    def __init__(self, model: "PreTrainedModel", rows: int):
        super().__init__()
        self.model = model
        self._parts = anatomy(model)
        self._rows = rows

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the sum over answer tokens, a scalar in float64."""
        check_padding(batch)
        ids = self._on_device(batch.input_ids)
        packed = {} if batch.position_ids is None else {"position_ids": self._on_device(batch.position_ids)}
        hidden = self._parts.decoder(input_ids=ids, attention_mask=None, use_cache=False, **packed)
        where, targets = self._on_device(answer_tokens(batch.labels))
        normed = hidden.last_hidden_state.flatten(0, 1).index_select(0, where)
        loss = torch.zeros((), dtype=torch.float64, device=ids.device)
        # Not chunked_cross_entropy, which has no forward derivative.
        for piece, wanted in zip(normed.split(self._rows), targets.split(self._rows)):
            logits = self._parts.family.logits(self._parts.head(piece), self.model.config)
            exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = loss + nn.functional.cross_entropy(exact, wanted, reduction="sum").double()
        return loss

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(array, dtype=np.int64)).to(self._parts.embedding.weight.device)


@torch.no_grad()
def loss_along(
    loss: AnswerLoss, batch: Batch, values: Tensors, tangents: Tensors
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (the loss of a micro-batch, its derivative along a direction), scalars in float64.

    Attention is computed by torch's plain kernel, which holds all T x T scores of a block, and experts one
    after the other: the fused kernels have no forward derivative.

    Args:
        values: of the tensors that the direction changes, by their names in the model.
        tangents: the direction, of the same names, shapes and types.

    Raises:
        ModelError: an operator of the model has no forward derivative.
    """
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), _plain_experts(loss.model.config):
        duals = {
            f"model.{name}": forward_ad.make_dual(values[name].detach(), tangent)
            for name, tangent in tangents.items()
        }
        try:
            found = forward_ad.unpack_dual(functional_call(loss, duals, (batch,)))
        except NotImplementedError as error:
            raise ModelError(
                f"{loss.model.config.model_type} has an operator without a forward derivative, which forward "
                f"gradients need ({str(error).splitlines()[0]}); choose another federation.method"
            ) from error
        # There is no tangent where no answer token depends on the direction.
        return found.primal, torch.zeros_like(found.primal) if found.tangent is None else found.tangent


@contextmanager
def _plain_experts(config: "PretrainedConfig") -> Iterator[None]:
    """Let a mixture of experts compute them by a loop; other models have nothing to change."""
    chosen = config._experts_implementation
    config._experts_implementation = "eager"
    try:
        yield
    finally:
        config._experts_implementation = chosen


def tangents_of(values: Tensors, seed: int) -> dict[str, torch.Tensor]:
    """Return the random direction of a seed (`engine.directions`) for some tensors, rounded to their type."""
    return {
        name: torch.from_numpy(direction(seed, name, value.shape)).to(value.device, value.dtype)
        for name, value in values.items()
    }
