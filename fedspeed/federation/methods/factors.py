"""Linear algebra of LoRA's factors, which never forms a product B A, and how far two states are apart."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedspeed.federation.arrays import square_distance
from fedspeed.federation.layout import Layout
from fedspeed.models.factors import pairs

Tensors = Mapping[str, np.ndarray]
PROBES = 4  # probes a side: 16 values a matrix, whatever its size


def distance(before: Tensors, after: Tensors, names: Iterable[str]) -> float:
    """Return the Euclidean distance of two states over some of their tensors."""
    return math.sqrt(square_distance(before, after, names))


def moved(start: Tensors, delta: Tensors, factor: float) -> dict[str, np.ndarray]:
    """Return `start + factor * delta` in float32; what is not in `delta` stays as it is."""
    return {n: (v + factor * delta[n]).astype(np.float32) if n in delta else v for n, v in start.items()}


def product_norm(products: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Return the Frobenius norm of a sum of products, each given as its factors [out, r] and [r, in]; r may
    differ.

    With the factors put beside each other the sum is L R = Q_l (R_l R_r^T) Q_r^T, whose norm is that of the
    small matrix in the middle.
    """
    r_l = np.linalg.qr(np.concatenate([left for left, _ in products], axis=1).astype(np.float64), mode="r")
    r_r = np.linalg.qr(
        np.concatenate([right for _, right in products], axis=0).astype(np.float64).T, mode="r"
    )
    return float(np.linalg.norm(r_l @ r_r.T))


def fresh_a(name: str, shape: tuple[int, ...], seed: Sequence[int]) -> np.ndarray:
    """Draw a new factor A [r, in] as LoRA's is drawn at the start (models.adapters.initial_adapter), from
    `seed` alone.
    """
    rng = np.random.default_rng([0xF2A, *seed])
    if ".lora_embedding_A" in name:
        return rng.standard_normal(shape).astype(np.float32)
    bound = 1 / math.sqrt(shape[1])
    return rng.uniform(-bound, bound, shape).astype(np.float32)


@dataclass(frozen=True)
class Truncated:
    """Factors B [out, r] and A [r, in] of a sum of products, the Frobenius norm that truncation to r has
    lost, and the norm of the whole sum.
    """

    b: np.ndarray
    a: np.ndarray
    lost: float
    norm: float


def mean_product(bs: Sequence[np.ndarray], as_: Sequence[np.ndarray], shares: Sequence[float]) -> Truncated:
    """Return the rank-r factors nearest (Frobenius) to the weighted mean of the products B_k A_k; the
    singular values are split evenly between them.

    With B = [s_1 B_1 .. s_K B_K] = Q_b R_b and A = [A_1; ..; A_K] = (Q_a R_a)^T, the mean is Q_b (R_b R_a^T)
    Q_a^T, and the middle matrix, whose SVD decides, has only K r rows (Eckart and Young, 1936).

    Args:
        bs, as_: K factors of shapes [out, r] and [r, in]. shares: K weights that sum to 1.
    """
    r = as_[0].shape[0]
    q_b, r_b = np.linalg.qr(np.concatenate([s * b.astype(np.float64) for s, b in zip(shares, bs)], axis=1))
    q_a, r_a = np.linalg.qr(np.concatenate([a.astype(np.float64) for a in as_], axis=0).T)
    u, values, vt = np.linalg.svd(r_b @ r_a.T)
    root = np.sqrt(values[:r])
    keep = len(root)  # fewer than r only for a matrix smaller than r
    b = np.zeros((bs[0].shape[0], r), dtype=np.float32)
    a = np.zeros((r, as_[0].shape[1]), dtype=np.float32)
    b[:, :keep] = (q_b @ u[:, :keep]) * root
    a[:keep] = (root[:, None] * vt[:keep]) @ q_a.T
    return Truncated(b, a, float(np.linalg.norm(values[r:])), float(np.linalg.norm(values)))


class Sketch:
    """Estimates how far the product of averaged factors is from the average of the products, from 16 values a
    matrix. The estimate is off by about 0.4 of itself for one matrix, and by 0.4 / sqrt(M) for M of them.

    For Gaussian u and v, E (u^T M v)^2 = |M|_F^2. All participants draw the same probes from (seed, round),
    and u^T B A v is linear in the product, so its weighted sum travels with the update.
    """

    def __init__(self, layout: Layout, seed: int, round: int):
        shapes = dict(zip(layout.names, layout.shapes))
        self._probes = []
        for i, (a, b) in enumerate(pairs(layout.names)):
            rng = np.random.default_rng([seed, 0x5CE7C4, round, i])
            left = rng.standard_normal((PROBES, shapes[b][0]))
            right = rng.standard_normal((shapes[a][1], PROBES))
            self._probes.append((a, b, left, right))
        self.values = len(self._probes) * PROBES**2

    def of(self, tensors: Tensors) -> np.ndarray:
        """Return the products of some factors as the probes see them: [values] float64."""
        parts = [((u @ tensors[b]) @ (tensors[a] @ v)).reshape(-1) for a, b, u, v in self._probes]
        return np.concatenate(parts) if parts else np.zeros(0)

    def error(self, mean_of_products: np.ndarray, averaged: Tensors) -> float | None:
        """Return |mean of products - product of means| / |mean of products|, over all matrices; None without
        LoRA.
        """
        if not self._probes:
            return None
        norm = float(np.linalg.norm(mean_of_products))
        return float(np.linalg.norm(mean_of_products - self.of(averaged))) / norm if norm else 0.0
