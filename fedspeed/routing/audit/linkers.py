"""Linkers: attackers that get two anonymous sets of vectors and pair those of the same member, from their
content alone. Pure.

After "Fingerprint Attack" (Xu, Cohn and Ohrimenko, ECAI 2023), which re-links shuffled updates of federated
language models, and the methods that it compares with.
"""

from collections.abc import Callable

import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.optimize import linear_sum_assignment

PROJECTED = 512  # dimensions of a random projection
PIECES = 16  # of a vector, whose norms are its profile

# Takes two sets of vectors [n, values] and a random generator; returns [n] the row of the second set for each
# row of the first one.
Linker = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def cosine(a: np.ndarray, b: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Match by the angle between vectors."""
    return match(unit(a) @ unit(b).T)


def centred(a: np.ndarray, b: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Match by the angle between vectors, after subtracting each set's mean."""
    return match(unit(a - a.mean(0)) @ unit(b - b.mean(0)).T)


def norms(a: np.ndarray, b: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Match by the norms of pieces, as of layers: some data train some layers more than others."""
    one, two = (
        np.log1p(np.stack([np.linalg.norm(piece, axis=1) for piece in np.array_split(x, PIECES, axis=1)], 1))
        for x in (a, b)
    )
    return match(-np.linalg.norm(one[:, None] - two[None], axis=2))


def signs(a: np.ndarray, b: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Match by the signs of coordinates alone."""
    return match(np.sign(a) @ np.sign(b).T)


def greedy(a: np.ndarray, b: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Match the closest pair first, by the angle in a random projection."""
    one, two = _projected(a, b, random)
    similarity = unit(one) @ unit(two).T
    out = np.full(len(a), -1)
    for _ in range(len(a)):
        i, j = np.unravel_index(np.argmax(similarity), similarity.shape)
        out[i] = j
        similarity[i] = -np.inf
        similarity[:, j] = -np.inf
    return out


def clusters(a: np.ndarray, b: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Match vectors of the same k-means cluster over both sets, in a random projection; the angle decides
    among several, or if there are none.
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


def match(similarity: np.ndarray) -> np.ndarray:
    """Return for each row the column of the one-to-one assignment with the greatest sum."""
    return linear_sum_assignment(-similarity)[1]


def unit(x: np.ndarray) -> np.ndarray:
    """Return the rows of `x` with norm 1."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)


def _projected(a: np.ndarray, b: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return both sets in the same random projection, unless they have few dimensions already."""
    if a.shape[1] <= PROJECTED:
        return a, b
    directions = random.standard_normal((a.shape[1], PROJECTED))
    return a @ directions, b @ directions
