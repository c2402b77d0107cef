"""Random directions that a seed names: what zero-order methods move weights along, on whatever rank. CPU, and
no torch where only the direction is asked for.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np


def direction(seed: int, name: str, shape: Sequence[int]) -> np.ndarray:
    """Draw the direction [shape] float32 of a tensor, standard normal: a function of (seed, name, shape)
    alone, so that whoever knows the seed can draw it again (Zelikman et al., 2023; FedKSeed, Qin et al.,
    2024).

    Args:
        seed: not negative.
    """
    words = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u4")
    bits = np.random.Philox(np.random.SeedSequence([seed, *words.tolist()]))
    return np.random.Generator(bits).standard_normal(tuple(shape), dtype=np.float32)


def perturbed(values: Mapping, seed: int, scale: float) -> dict:
    """Add `scale` times each tensor's direction to fp32 CPU tensors by name; returns new tensors."""
    import torch

    return {
        name: value + scale * torch.from_numpy(direction(seed, name, value.shape))
        for name, value in values.items()
    }
