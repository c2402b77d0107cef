"""The folded adapter: a second adapter in addition to LoRA, frozen and common to all clients, which an
aggregate may grow.

A method whose exact aggregate is no LoRA of rank r (`stack`, `residual`) keeps the remainder in it. To an
adapted module of scale s = alpha / r that computes W x + s B A x, it adds s F x. F is kept as factors
[out, R] and [R, in] while these are smaller than the product [out, in], and as the product from then on,
which is exact and grows no further.

It is never merged into the base. A base in 16 bits would round away most of a small F, a quantised one would
have to be quantised anew in every round, and most tiers share the base among clients or ranks, or keep it in
read-only memory. Apart from the base, F is right on all of them, at the precision that the model computes in.

This module works on names and arrays only, so that aggregation, export and engines interpret F alike.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedspeed.models.factors import is_factor_a, pairs

PREFIX = "folded:"
LEFT = "left"  # [out, R]
RIGHT = "right"  # [R, in]
WHOLE = "whole"  # [out, in], instead of the other two


def is_folded(name: str) -> bool:
    """Say whether an array of a global state belongs to the folded adapter, which no client trains."""
    return name.startswith(PREFIX)


def trainable(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return those arrays of a global state that clients train. Others have names of the form KIND:NAME,
    which no parameter has: the folded ones, and other arrays that a method sends to all participants, such
    as control variates.
    """
    return {name: array for name, array in state.items() if ":" not in name}


def module_of(name: str) -> str:
    """Return the path of the module that a factor A or B, or its bias, belongs to."""
    return name.partition(".lora_")[0]


def folded_parts(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the folded arrays of a state: module path -> {LEFT: ..., RIGHT: ...} or {WHOLE: ...}."""
    found: dict[str, dict[str, Any]] = {}
    for name, array in state.items():
        if is_folded(name):
            module, _, kind = name.removeprefix(PREFIX).rpartition(".")
            found.setdefault(module, {})[kind] = array
    return found


def folded_name(module: str, kind: str) -> str:
    """Return the name that a module's folded array has in a state."""
    return f"{PREFIX}{module}.{kind}"


def named(module: str, parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a module's folded arrays by the names that they have in a state."""
    return {folded_name(module, kind): array for kind, array in parts.items()}


def fold(folded: Mapping[str, np.ndarray], left: np.ndarray, right: np.ndarray) -> dict[str, np.ndarray]:
    """Return a module's folded arrays with the product of `left` [out, k] and `right` [k, in] added.

    Factors are concatenated to the module's earlier ones. As soon as they would have as many values as their
    product, the product replaces them, so that the folded adapter never becomes larger than the weights.

    Args:
        folded: the module's arrays from `folded_parts`; empty where nothing is folded.
    """
    if WHOLE in folded:
        return {WHOLE: (folded[WHOLE] + left @ right).astype(np.float32)}
    if folded:
        left = np.concatenate([folded[LEFT], left], axis=1)
        right = np.concatenate([folded[RIGHT], right], axis=0)
    if left.size + right.size >= len(left) * right.shape[1]:
        return {WHOLE: (left.astype(np.float64) @ right).astype(np.float32)}
    return {LEFT: left.astype(np.float32), RIGHT: right.astype(np.float32)}


def with_folded(
    state: Mapping[str, np.ndarray], additions: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return all folded arrays of a state after some products were added.

    Args:
        additions: factors [out, k] and [k, in] of the product to add to a module, by the name of the module's
            factor A.
    """
    by_module = folded_parts(state)
    for a, (left, right) in additions.items():
        module = module_of(a)
        by_module[module] = fold(by_module.get(module, {}), left, right)
    return {
        name: array for module, arrays in by_module.items() for name, array in named(module, arrays).items()
    }


def as_factors(parts: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return factors [out, R] and [R, in] of a module's folded product; a whole one has a unit matrix as the
    other.
    """
    if WHOLE not in parts:
        return parts[LEFT], parts[RIGHT]
    whole = parts[WHOLE]
    out, wide = whole.shape
    if out <= wide:
        return np.eye(out, dtype=whole.dtype), whole
    return whole, np.eye(wide, dtype=whole.dtype)


def as_one_adapter(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return LoRA and folded adapter together as one LoRA of the same scale, whose factors have rank r + R in
    every module.

    B becomes [B left] and A becomes [A; right]. PEFT has one rank for all modules by default, so where
    R differs the factors are padded with zeros.
    """
    folded = folded_parts(state)
    lora = trainable(state)
    if not folded:
        return lora
    found = {module: as_factors(parts) for module, parts in folded.items()}
    widest = max(left.shape[1] for left, _ in found.values())
    joined = dict(lora)
    for a, b in pairs(lora):
        left, right = found.get(module_of(a), (np.zeros((len(lora[b]), 0)), np.zeros((0, lora[a].shape[1]))))
        missing = widest - len(right)
        joined[b] = np.concatenate([lora[b], np.pad(left, ((0, 0), (0, missing)))], axis=1).astype(
            lora[b].dtype
        )
        joined[a] = np.concatenate([lora[a], np.pad(right, ((0, missing), (0, 0)))], axis=0).astype(
            lora[a].dtype
        )
    return joined


def rank_of(state: Mapping[str, Any]) -> int:
    """Return the rank of the LoRA factors among some arrays, 0 where there are none."""
    return next((len(array) for name, array in state.items() if is_factor_a(name)), 0)
