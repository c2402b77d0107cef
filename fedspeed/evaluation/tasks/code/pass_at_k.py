"""pass@k: the chance that at least one of k samples is right."""

from math import comb


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return the unbiased estimate of pass@k from more samples than k.

    It is the share of the choices of k samples that contain a correct one: 1 - C(n - c, k) / C(n, k) (Chen et
    al. 2021, Evaluating Large Language Models Trained on Code).

    Args:
        samples: number of samples, at least k. correct: how many of them are.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} of {samples} samples, {correct} of them correct")
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def reported_ks(samples: int) -> tuple[int, ...]:
    """Return the k that are reported for a number of samples: 1, 10 and 100 as far as they go, and all."""
    return tuple(sorted({1, samples, *(k for k in (10, 100) if k <= samples)}))
