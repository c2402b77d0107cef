"""Conversion between named arrays and the tensors of an engine."""

from collections.abc import Mapping

import numpy as np
import torch

from fedspeed.federation.arrays import Arrays


def as_arrays(tensors: Mapping[str, torch.Tensor]) -> Arrays:
    """Return tensors on the CPU as arrays, without copying them."""
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def as_torch(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Return arrays as tensors, without copying them."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
