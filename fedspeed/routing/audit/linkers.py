"""Who belongs to whom across two rounds, told from content alone: attackers that are given two anonymous sets
of vectors and pair them. Pure.

After "Fingerprint Attack" (Xu, Cohn and Ohrimenko, ECAI 2023), which re-links shuffled updates of federated
language models, and its elders.
"""

from collections.abc import Callable

import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.optimize import linear_sum_assignment

SKETCH = 512  # dimensions of a random projection
LAYERS = 16  # pieces whose norms make a profile

Linker = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def cosine(a: np.ndarray, b: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Best matching by the angle between vectors."""
    return match(unit(a) @ unit(b).T)


def centred(a: np.ndarray, b: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The same after what all have in common is taken away."""
    return match(unit(a - a.mean(0)) @ unit(b - b.mean(0)).T)


def norms(a: np.ndarray, b: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """By the sizes of pieces, as of layers: some rows train some of them more."""
    one, two = (
        np.log1p(np.stack([np.linalg.norm(piece, axis=1) for piece in np.array_split(x, LAYERS, axis=1)], 1))
        for x in (a, b)
    )
    return match(-np.linalg.norm(one[:, None] - two[None], axis=2))


def signs(a: np.ndarray, b: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """By the signs of coordinates alone."""
    return match(np.sign(a) @ np.sign(b).T)


def greedy(a: np.ndarray, b: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """In a random projection, the closest pair first."""
    one, two = _projected(a, b, random)
    near = unit(one) @ unit(two).T
    out = np.full(len(a), -1)
    for _ in range(len(a)):
        i, j = np.unravel_index(np.argmax(near), near.shape)
        out[i] = j
        near[i], near[:, j] = -np.inf, -np.inf
    return out


def clusters(a: np.ndarray, b: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """k-means over both rounds together in a random projection; pairs are those of the same cluster, as far
    as there are any.
    """
    one, two = _projected(a, b, random)
    both = unit(np.concatenate([one, two]))
    _, labels = kmeans2(both, len(a), minit="++", rng=random, missing="warn")
    same = (labels[: len(a), None] == labels[None, len(a) :]).astype(float)
    return match(same + 1e-6 * (both[: len(a)] @ both[len(a) :].T))


LINKERS: dict[str, Linker] = {
    "cosine": cosine,
    "cosine, centred": centred,
    "norms of layers": norms,
    "signs": signs,
    "greedy": greedy,
    "k-means": clusters,
}


def match(nearness: np.ndarray) -> np.ndarray:
    """For each row the column of the assignment with the greatest sum."""
    return linear_sum_assignment(-nearness)[1]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)


def _projected(a: np.ndarray, b: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    if a.shape[1] <= SKETCH:
        return a, b
    directions = random.standard_normal((a.shape[1], SKETCH))
    return a @ directions, b @ directions
