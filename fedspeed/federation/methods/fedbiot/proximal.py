"""The gradient of FedBiOT's proximal term, without any matrix of a weight's size.

The term is |W - W_0|^2 over the adapter's matrices, where W = base + s B A holds the LoRA, and W_0 is its
value at the beginning of the round, so that W - W_0 = s (B A - B_0 A_0). With P = B - B_0 and Q = A - A_0
this is s (P A + B_0 Q), and the gradients are

    by B: 2 s^2 (P A + B_0 Q) A^T = 2 s^2 (P (A A^T) + B_0 (Q A^T))
    by A: 2 s^2 B^T (P A + B_0 Q) = 2 s^2 ((B^T P) A + (B^T B_0) Q),

of products of size r x r. They are made of the differences P and Q, because B A - B_0 A_0 would cancel nearly
all digits in the first steps of a round.
"""

from collections.abc import Mapping

import numpy as np

from fedspeed.models.factors import pairs

Arrays = Mapping[str, np.ndarray]  # by name


def proximal_gradient(now: Arrays, start: Arrays, scale: float) -> dict[str, np.ndarray]:
    """Return the gradient of the sum of |W - W_0|^2 over all LoRA products, by the names of the factors.

    Args:
        now, start: factors A [r, in] and B [out, r]; arrays of other names do not matter.
        scale: s, LoRA's alpha / r.
    """
    gradients = {}
    for name_a, name_b in pairs(now):
        a = now[name_a]
        b = now[name_b]
        first_b = start[name_b]
        p = b - first_b
        q = a - start[name_a]
        factor = 2 * scale**2
        gradients[name_b] = factor * (p @ (a @ a.T) + first_b @ (q @ a.T))
        gradients[name_a] = factor * ((b.T @ p) @ a + (b.T @ first_b) @ q)
    return gradients
