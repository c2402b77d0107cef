"""Gradients that were computed elsewhere, given to a DeepSpeed engine as the backward of a loss."""

from collections.abc import Mapping

import torch

from fedspeed.engine.client_state import ClientState


def surrogate_loss(state: ClientState, grads: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Make a loss whose backward gives the trainable parameters these gradients, scaled as `state` wants
    them.

    So DeepSpeed reduces, clips, checks and applies them as it does its own.

    Args:
        grads: [fp32] by name, times the loss scale; zero for trainable tensors that are left out.
    """
    flats = [
        torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        for parameter in state.parameters
    ]
    flat_of = {id(parameter): flat for parameter, flat in zip(state.parameters, flats)}
    given = [
        (place.of(flat_of[id(place.parameter)]), grads[name])
        for name, place in state.places.items()
        if name in grads
    ]
    torch._foreach_copy_([place for place, _ in given], [grad for _, grad in given])
    return _HandOver.apply(state.scaler.scale, flats, *state.parameters)


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale, grads, *parameters):
        ctx.scale = scale
        ctx.grads = grads
        ctx.shapes = [(p.shape, p.dtype) for p in parameters]
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx, upward):
        factor = (
            upward.float() / ctx.scale
        )  # the gradients carry the loss scale already, and DeepSpeed multiplies by it
        # In place: nobody else has these sums, and they may be as large as what trains.
        scaled = (
            grad.mul_(factor).to(dtype).view(shape) for grad, (shape, dtype) in zip(ctx.grads, ctx.shapes)
        )
        return None, None, *scaled
