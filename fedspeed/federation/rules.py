"""Aggregation rules: what a client contributes to the sum, and what the sum means. Pure functions of named arrays.

LoRA's update is a product B A, and the mean of products is not the product of means. The rules differ in how they face that:

- `avg_factors` averages A and B separately (what most systems do) and logs how wrong that is;
- `freeze_a` trains only B, which makes the mean exact (FFA-LoRA, Sun et al., ICLR 2024);
- `alternate` trains B and A in turn by round, each exact while the other stands (RoLoRA, Chen et al., 2024);
- `svd` collects the factors and keeps the best rank-r approximation of the mean product (FlexLoRA, Bai et al., NeurIPS 2024).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from fedspeed.federation.layout import Layout
from fedspeed.models.factors import is_factor_a, is_factor_b, pairs

Tensors = Mapping[str, np.ndarray]
PROBES = 4  # probes a side: 16 words a matrix, whatever its size


@dataclass(frozen=True)
class Result:
    """`state` is the plain aggregate (before any server optimizer); `factor_error` is None where no product is trained."""

    state: dict[str, np.ndarray]
    factor_error: float | None


def rule_of(method) -> str:
    """Return the rule that a value of federation.method stands for."""
    return "svd" if method.name == "flexlora" else method.rule


def held(rule: str, round: int, names) -> frozenset[str]:
    """The names that keep their value in this round (rounds count from 1; `alternate` begins with B: while B = 0, A has no gradient)."""
    if rule == "freeze_a" or (rule == "alternate" and round % 2 == 1):
        return frozenset(filter(is_factor_a, names))
    if rule == "alternate":
        return frozenset(filter(is_factor_b, names))
    return frozenset()


def stuck(rule: str, tensors: Tensors) -> str:
    """A factor A that is zero and would stay so, empty if there is none: its B never has a gradient. PEFT leaves the A of a fresh LoRA beside
    an embedding at zero."""
    held_a = (name for name in held(rule, 1, tensors) if is_factor_a(name)) if rule == "freeze_a" else ()
    return next((name for name in sorted(held_a) if not np.any(tensors[name])), "")


class SumRule:
    """`avg_factors`, `freeze_a` and `alternate`: the weighted mean of the changes, read from one sum of all clients.

    `exact_error` says whether the factor error of a result is one, or an estimate.

    The vector is the weighted change of the tensors that train, followed by the weighted sketch of the products; `parts` are the lengths of these, in that
    order.
    """

    exact_error = False

    def __init__(self, layout: Layout, still: frozenset[str], seed: int, round: int):
        self._trained = layout.without(still)
        self._sketch = Sketch(layout, seed, round)
        self.words = self._trained.size + self._sketch.words
        self.parts = (*self._trained.sizes, self._sketch.words)

    def contribution(self, client: int, weight: float, start: Tensors, end: Tensors) -> np.ndarray:
        """[words] float32: what client adds to the sum for having moved from `start` to `end`."""
        change = weight * (self._trained.flatten(end).astype(np.float64) - self._trained.flatten(start))
        return np.concatenate([change, weight * self._sketch.of(end)]).astype(np.float32)

    def result(self, start: Tensors, total: np.ndarray, weight: float, factor: float = 1.0) -> Result:
        """The aggregate, from the sum of all contributions and of all weights. factor: what the mean change is multiplied by."""
        mean = total.astype(np.float64) / weight
        change = self._trained.unflatten(mean[:self._trained.size])
        state, plain = (_moved(start, change, by) for by in (factor, 1.0))
        return Result(state, self._sketch.error(mean[self._trained.size:], plain))

    def change_norm(self, before: Tensors, after: Tensors) -> float:
        """Euclidean norm of what has changed, over all tensors."""
        return distance(before, after, before)


def _moved(start: Tensors, change: Tensors, factor: float) -> dict[str, np.ndarray]:
    return {n: (v + factor * change[n]).astype(np.float32) if n in change else v for n, v in start.items()}


class SvdRule:
    """`svd`: every client's factors travel in a slot of their own, so the sum hides nobody: for the plain exchange only.

    What is no factor (the bias of a B) is averaged.
    """

    exact_error = True

    def __init__(self, layout: Layout, clients: int):
        self._layout, self._clients = layout, clients
        self.words = clients * (layout.size + 1)
        self.parts = (self.words,)

    def contribution(self, client: int, weight: float, start: Tensors, end: Tensors) -> np.ndarray:
        slots = np.zeros((self._clients, self._layout.size + 1), dtype=np.float32)
        slots[client, 0], slots[client, 1:] = weight, self._layout.flatten(end)
        return slots.reshape(-1)

    def result(self, start: Tensors, total: np.ndarray, weight: float, factor: float = 1.0) -> Result:
        slots = total.reshape(self._clients, -1)
        present = [(float(s[0]), self._layout.unflatten(s[1:])) for s in slots if s[0] > 0]
        shares = [w / sum(w for w, _ in present) for w, _ in present]
        state, lost, whole = {}, 0.0, 0.0
        for a, b in pairs(self._layout.names):
            state[b], state[a], cut, norm = mean_product([t[b] for _, t in present], [t[a] for _, t in present], shares)
            if norm == 0:  # nobody has moved off B = 0; with A = 0 too, neither would ever have a gradient again
                state[a] = start[a]
            lost, whole = lost + cut**2, whole + norm**2
        for name in set(self._layout.names) - state.keys():
            mean = sum(share * tensors[name].astype(np.float64) for share, (_, tensors) in zip(shares, present))
            state[name] = mean.astype(np.float32)
        return Result(state, (lost / whole) ** 0.5 if whole else 0.0)

    def change_norm(self, before: Tensors, after: Tensors) -> float:
        """Euclidean norm of what has changed, of products B A: factors are given anew each round, up to a rotation that changes nothing."""
        found = pairs(self._layout.names)
        products = [product_distance((before[b], before[a]), (after[b], after[a])) for a, b in found]
        others = set(self._layout.names) - {name for pair in found for name in pair}
        return math.hypot(*products, distance(before, after, others))


def distance(before: Tensors, after: Tensors, names: Iterable[str]) -> float:
    """Euclidean distance of two states over some of their tensors."""
    return math.sqrt(sum(float(np.sum((after[n].astype(np.float64) - before[n]) ** 2)) for n in names))


def product_distance(before: tuple[np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray]) -> float:
    """Frobenius norm of the difference of two products, each given as its factors B [out, r] and A [r, in], without forming one.

    The difference is [B' -B] [A'; A] = Q_b (R_b R_a^T) Q_a^T, whose norm is that of the small matrix in the middle.
    """
    (b, a), (new_b, new_a) = before, after
    r_b = np.linalg.qr(np.concatenate([new_b, -b], axis=1).astype(np.float64), mode="r")
    r_a = np.linalg.qr(np.concatenate([new_a, a], axis=0).astype(np.float64).T, mode="r")
    return float(np.linalg.norm(r_b @ r_a.T))


def mean_product(bs: list[np.ndarray], as_: list[np.ndarray], shares: list[float]) -> tuple[np.ndarray, np.ndarray, float, float]:
    """The rank-r factors nearest (Frobenius) to the weighted mean of the products B_k A_k, without ever forming a product.

    With B = [s_1 B_1 .. s_K B_K] = Q_b R_b and A = [A_1; ..; A_K] = (Q_a R_a)^T, the mean is Q_b (R_b R_a^T) Q_a^T, and the middle matrix,
    whose SVD decides, has only K r rows.

    Args:
        bs, as_: K factors of shapes [out, r] and [r, in]. shares: K weights that sum to 1.

    Returns:
        B [out, r], A [r, in] (the singular values split evenly between them), the norm that truncation lost, and the mean's norm.
    """
    r = as_[0].shape[0]
    q_b, r_b = np.linalg.qr(np.concatenate([s * b.astype(np.float64) for s, b in zip(shares, bs)], axis=1))
    q_a, r_a = np.linalg.qr(np.concatenate([a.astype(np.float64) for a in as_], axis=0).T)
    u, values, vt = np.linalg.svd(r_b @ r_a.T)
    root = np.sqrt(values[:r])
    keep = len(root)  # fewer than r only for a matrix smaller than r
    b = np.zeros((bs[0].shape[0], r), dtype=np.float32)
    a = np.zeros((r, as_[0].shape[1]), dtype=np.float32)
    b[:, :keep], a[:keep] = (q_b @ u[:, :keep]) * root, (root[:, None] * vt[:keep]) @ q_a.T
    return b, a, float(np.linalg.norm(values[r:])), float(np.linalg.norm(values))


class Sketch:
    """Estimates how far the product of averaged factors is from the average of the products, from 16 words a matrix. The estimate is off by about 0.4 of
    itself for one matrix, and by 0.4 / sqrt(M) for M of them.

    For Gaussian u and v, E (u^T M v)^2 = |M|_F^2. All participants draw the same probes from (seed, round), and u^T B A v is linear in
    the product, so its weighted sum travels with the update.
    """

    def __init__(self, layout: Layout, seed: int, round: int):
        shapes = dict(zip(layout.names, layout.shapes))
        self._probes = []
        for i, (a, b) in enumerate(pairs(layout.names)):
            rng = np.random.default_rng([seed, 0x5CE7C4, round, i])
            self._probes.append((a, b, rng.standard_normal((PROBES, shapes[b][0])), rng.standard_normal((shapes[a][1], PROBES))))
        self.words = len(self._probes) * PROBES**2

    def of(self, tensors: Tensors) -> np.ndarray:
        """[words] float64."""
        parts = [((u @ tensors[b]) @ (tensors[a] @ v)).reshape(-1) for a, b, u, v in self._probes]
        return np.concatenate(parts) if parts else np.zeros(0)

    def error(self, mean_of_products: np.ndarray, averaged: Tensors) -> float | None:
        """|mean of products - product of means| / |mean of products|, over all matrices; None without LoRA."""
        if not self._probes:
            return None
        norm = float(np.linalg.norm(mean_of_products))
        return float(np.linalg.norm(mean_of_products - self.of(averaged))) / norm if norm else 0.0


def make_rule(rule: str, layout: Layout, clients: int, seed: int, round: int):
    """The rule of one round."""
    if rule == "svd":
        return SvdRule(layout, clients)
    return SumRule(layout, held(rule, round, layout.names), seed, round)
