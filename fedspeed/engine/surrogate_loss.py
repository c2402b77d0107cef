"""A loss whose gradients are given: the way to pass gradients computed elsewhere to a DeepSpeed engine."""

from collections.abc import Mapping
from typing import Any

import torch

from fedspeed.engine.client_state import ClientState


def surrogate_loss(state: ClientState, grads: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return a scalar loss whose backward pass gives the trainable parameters the given gradients.

    DeepSpeed then reduces, clips, checks and applies them like gradients that it has computed itself.

    Args:
        grads: [fp32] by name, times the loss scale; missing trainable tensors get zero.
    """
    flats = [
        torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        for parameter in state.parameters
    ]
    flat_of = {id(parameter): flat for parameter, flat in zip(state.parameters, flats)}
    pairs = [
        (part.view_in(flat_of[id(part.parameter)]), grads[name])
        for name, part in state.slices.items()
        if name in grads
    ]
    torch._foreach_copy_([target for target, _ in pairs], [grad for _, grad in pairs])
    return _GivenGradients.apply(state.scaler.scale, flats, *state.parameters)


class _GivenGradients(torch.autograd.Function):
    """A function of the parameters that returns zero, and whose gradients are given."""

    @staticmethod
    def forward(ctx: Any, scale: float, grads: list[torch.Tensor], *parameters: torch.Tensor) -> torch.Tensor:
        ctx.scale = scale
        ctx.grads = grads
        ctx.shapes = [(p.shape, p.dtype) for p in parameters]
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx: Any, output_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # The gradients include the loss scale already, and DeepSpeed multiplies by it.
        factor = output_grad.float() / ctx.scale
        # In place: the sums are not used elsewhere, and may be as large as the trainable tensors.
        scaled = (
            grad.mul_(factor).to(dtype).view(shape) for grad, (shape, dtype) in zip(ctx.grads, ctx.shapes)
        )
        return None, None, *scaled
