"""Linear algebra of LoRA's factors that never forms a product B A, and distances between states."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedspeed.federation.arrays import square_distance
from fedspeed.federation.layout import Layout
from fedspeed.models.factors import pairs

Tensors = Mapping[str, np.ndarray]  # by name
PROBES = 4  # random vectors on each side of a matrix, so that its sketch has 16 values


def distance(before: Tensors, after: Tensors, names: Iterable[str]) -> float:
    """Return the Euclidean distance between two states over the arrays of some names."""
    return math.sqrt(square_distance(before, after, names))


def add_scaled(start: Tensors, delta: Tensors, factor: float) -> dict[str, np.ndarray]:
    """Return `start + factor * delta` in float32; arrays that `delta` does not have stay unchanged."""
    return {n: (v + factor * delta[n]).astype(np.float32) if n in delta else v for n, v in start.items()}


def product_norm(products: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Return the Frobenius norm of a sum of products.

    With the factors concatenated to L and R, the sum is L R = Q_l (R_l R_r^T) Q_r^T, whose norm is that of
    the small matrix R_l R_r^T.

    Args:
        products: the factors [out, r] and [r, in] of each product; r may differ between products.
    """
    all_left = np.concatenate([left for left, _ in products], axis=1).astype(np.float64)
    all_right = np.concatenate([right for _, right in products], axis=0).astype(np.float64)
    r_l = np.asarray(np.linalg.qr(all_left, mode="r"))
    r_r = np.asarray(np.linalg.qr(all_right.T, mode="r"))
    return float(np.linalg.norm(r_l @ r_r.T))


def fresh_a(name: str, shape: tuple[int, ...], seed: Sequence[int]) -> np.ndarray:
    """Return a new factor A [r, in] with the distribution of LoRA's initial one
    (models.adapters.initial_adapter).

    Args:
        name: of the factor. seed: the values are a function of it.
    """
    rng = np.random.default_rng([0xF2A, *seed])
    if ".lora_embedding_A" in name:
        return rng.standard_normal(shape).astype(np.float32)
    bound = 1 / math.sqrt(shape[1])
    return rng.uniform(-bound, bound, shape).astype(np.float32)


@dataclass(frozen=True)
class Truncated:
    """A sum of products, truncated to rank r.

    Attributes:
        b, a: its factors [out, r] and [r, in].
        directions: how many of the r have a product that is not zero.
        lost: Frobenius norm of what the truncation has removed. norm: Frobenius norm of the whole sum.
    """

    b: np.ndarray
    a: np.ndarray
    directions: int
    lost: float
    norm: float


def mean_product(
    bs: Sequence[np.ndarray], as_: Sequence[np.ndarray], shares: Sequence[float], r: int
) -> Truncated:
    """Return the rank-r factors whose product is nearest to the weighted mean of the products B_k A_k in the
    Frobenius norm (Eckart and Young, 1936), by descending singular values. Each factor is scaled by their
    square roots.

    With B = [s_1 B_1 .. s_K B_K] = Q_b R_b and A = [A_1; ..; A_K] = (Q_a R_a)^T, the mean is Q_b (R_b R_a^T)
    Q_a^T, so that an SVD of the small matrix R_b R_a^T with K r rows is enough.

    Args:
        bs, as_: K factors of shapes [out, r_k] and [r_k, in]; r_k may differ. shares: K weights.
        r: the rank to return.
    """
    q_b, r_b = np.linalg.qr(np.concatenate([s * b.astype(np.float64) for s, b in zip(shares, bs)], axis=1))
    q_a, r_a = np.linalg.qr(np.concatenate([a.astype(np.float64) for a in as_], axis=0).T)
    u, values, vt = np.linalg.svd(r_b @ r_a.T)
    root = np.sqrt(values[:r])
    keep = len(root)  # fewer than r only for a matrix smaller than r
    b = np.zeros((bs[0].shape[0], r), dtype=np.float32)
    a = np.zeros((r, as_[0].shape[1]), dtype=np.float32)
    b[:, :keep] = (q_b @ u[:, :keep]) * root
    a[:keep] = (root[:, None] * vt[:keep]) @ q_a.T
    directions = int(np.count_nonzero(values[:r] > values[0] * len(values) * np.finfo(np.float64).eps))
    b[:, directions:] = 0.0
    return Truncated(
        b,
        a,
        directions=directions,
        lost=float(np.linalg.norm(values[r:])),
        norm=float(np.linalg.norm(values)),
    )


def untrained(
    b: np.ndarray, a: np.ndarray, lora_ranks: Sequence[int], shares: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Return factors [out, k] and [k, in] of the mean, over clients, of those directions of the common
    product that a client does not train; k = 0 where all clients train all.

    Args:
        b, a: the common factors [out, R] and [R, in]. lora_ranks, shares: of the clients.
    """
    first = min(lora_ranks)
    frozen = [sum(s for s, r in zip(shares, lora_ranks) if r <= k) for k in range(first, len(a))]
    return b[:, first:] * np.array(frozen), a[first:]


class Sketch:
    """Estimates the distance between the product of averaged factors and the average of the products, from 16
    values a matrix. The relative error of the estimate is about 0.4 for one matrix, 0.4 / sqrt(M) for M of
    them.

    For Gaussian u and v, E (u^T M v)^2 = |M|_F^2. All participants draw the same u and v from (seed, round),
    and u^T B A v is linear in the product, so its weighted sum is sent along with the update.

    Attributes:
        values: number of values of a sketch.
    """

    def __init__(self, layout: Layout, seed: int, round: int):
        shapes = dict(zip(layout.names, layout.shapes))
        self._probes: list[tuple[str, str, np.ndarray, np.ndarray]] = []  # names of A and B; u and v
        for i, (a, b) in enumerate(pairs(layout.names)):
            rng = np.random.default_rng([seed, 0x5CE7C4, round, i])
            left = rng.standard_normal((PROBES, shapes[b][0]))
            right = rng.standard_normal((shapes[a][1], PROBES))
            self._probes.append((a, b, left, right))
        self.values = len(self._probes) * PROBES**2

    def of(self, tensors: Tensors) -> np.ndarray:
        """Return the sketch u^T B A v of all products B A in `tensors`: [values] float64."""
        sketches = [((u @ tensors[b]) @ (tensors[a] @ v)).reshape(-1) for a, b, u, v in self._probes]
        return np.concatenate(sketches) if sketches else np.zeros(0)

    def error(self, mean_of_products: np.ndarray, averaged: Tensors) -> float | None:
        """Return an estimate of |mean of products - product of means| / |mean of products| over all matrices;
        None without LoRA.

        Args:
            mean_of_products: the mean of the clients' sketches. averaged: the averaged factors.
        """
        if not self._probes:
            return None
        norm = float(np.linalg.norm(mean_of_products))
        return float(np.linalg.norm(mean_of_products - self.of(averaged))) / norm if norm else 0.0
