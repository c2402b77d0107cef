"""Fit a global state to an engine whose LoRA factors have another rank."""

from collections.abc import Mapping

import torch

from fedspeed.engine.masters import ParameterSlice, Tensors
from fedspeed.models.factors import is_factor_a
from fedspeed.models.lora_ranks import fitted


def fitted_state(state: Tensors, slices: Mapping[str, ParameterSlice]) -> Tensors:
    """Return a global state with LoRA factors of an engine's rank and the same products
    (`models.lora_ranks.fitted`); the same tensors if they have that rank already.

    Args:
        state: on the CPU. slices: of the tensors that the engine trains.
    """
    trained = next((name for name in slices if is_factor_a(name)), "")
    if trained not in state or len(state[trained]) == slices[trained].shape[0]:
        return state
    arrays = fitted({name: tensor.numpy() for name, tensor in state.items()}, slices[trained].shape[0])
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
