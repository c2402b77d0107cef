"""Random directions of zero-order and forward-mode methods, which any rank can draw again from the seed. They
are drawn on the CPU, without torch.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def direction_seed(key: Sequence[int], *, bits: int = 64) -> int:
    """Return the seed of a direction, a function of `key` only: so many bits that no two of a run are likely
    to be the same.

    Args:
        key: not negative; says which run, stream and direction it is. bits: of the seed, at most 64.
    """
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> (64 - bits)


def direction(seed: int, name: str, shape: Sequence[int]) -> np.ndarray:
    """Draw the direction [shape] float32 of a tensor from a standard normal distribution. It depends on
    (seed, name, shape) alone, so that a rank that knows the seed can draw it again (Zelikman et al., 2023;
    FedKSeed, Qin et al., 2024).

    Args:
        seed: not negative.
    """
    name_hash = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u4")
    bits = np.random.Philox(np.random.SeedSequence([seed, *name_hash.tolist()]))
    return np.random.Generator(bits).standard_normal(tuple(shape), dtype=np.float32)


def combined(
    shapes: Mapping[str, Sequence[int]], seeds: Sequence[int], factors: Sequence[float] | np.ndarray
) -> dict[str, np.ndarray]:
    """Return the sum of K directions, each times its factor: fp32 by name.

    With derivatives of a loss along the directions for factors, each divided by K, it is an unbiased estimate
    of the gradient, since E v v^T = 1 for standard normal v (Baydin et al., 2022). The directions are drawn
    again from their seeds: keeping them all would take K times the memory of the tensors.

    Args:
        shapes: of the tensors, by name. seeds, factors: K each.
    """
    total = {name: np.zeros(tuple(shape), dtype=np.float32) for name, shape in shapes.items()}
    for seed, factor in zip(seeds, factors, strict=True):
        for name, shape in shapes.items():
            total[name] += np.float32(factor) * direction(seed, name, shape)
    return total


def perturbed(values: "Mapping[str, torch.Tensor]", seed: int, scale: float) -> "dict[str, torch.Tensor]":
    """Add `scale` times each tensor's direction to fp32 CPU tensors by name; returns new tensors."""
    import torch

    return {
        name: value + scale * torch.from_numpy(direction(seed, name, value.shape))
        for name, value in values.items()
    }
