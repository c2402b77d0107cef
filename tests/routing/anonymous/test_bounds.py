"""The bounds of fixed-point sums: no honest value is above its bound, and little precision is lost."""

import math

import numpy as np
import pytest

from fedspeed.routing.anonymous import ring
from fedspeed.routing.anonymous.bounds import (
    BLOCK_VALUES,
    MAX_NORM_BOUND,
    MIN_NORM_BOUND,
    blocks_of,
    norm_bound,
    norm_bounds,
)


def noise(seed):
    random = np.random.default_rng(seed)
    return lambda out: out.__setitem__(slice(None), random.integers(0, 2**32, len(out), dtype=np.uint32))


def summed(vectors, blocks):
    """Return (sum of fixed-point vectors, clipped values), as an exchange of these members computes them."""
    random = np.random.default_rng(len(vectors))
    random_bits = random.integers(0, 2**32, (len(vectors), len(blocks)), dtype=np.uint32)
    bounds = sum(norm_bounds(vector, blocks, bits) for vector, bits in zip(vectors, random_bits))
    integers = np.zeros(len(vectors[0]), np.uint32)
    clipped = 0
    for i, vector in enumerate(vectors):
        own = np.empty(len(vector), np.uint32)
        for k, (block, bound) in enumerate(zip(blocks, bounds)):
            clipped += ring.encode(vector[block], bound, noise([i, k]), own[block])
        integers += own
    total = np.empty(len(integers), np.float32)
    for block, bound in zip(blocks, bounds):
        ring.decode(integers[block], bound, total[block])
    return total, clipped


def test_no_block_spans_two_tensors():
    assert blocks_of((3, 0, 5)) == [slice(0, 3), slice(3, 8)]
    long = BLOCK_VALUES * 2 + 1
    blocks = blocks_of((7, long))
    assert [b.stop - b.start for b in blocks] == [7, 43691, 43691, 43691] and blocks[-1].stop == 7 + long
    assert all(a.stop == b.start for a, b in zip(blocks, blocks[1:]))


@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [2.0],
        [0.5, -0.5],
        [3.0, 4.0],
        [1e-30, 0.0],
        [1e-12] * 9,
        [1e15, 1.0],
        [-(2.0**30)],
        [float(np.float32(1) - np.float32(2**-24))],
    ],
)
def test_a_norm_bound_is_above_the_norm(values):
    norm = math.hypot(*values)
    vector = np.array(values, np.float32)
    for bits, factor in ((0, 1.02), (2**31, 1.44), (2**32 - 1, 2.03)):
        bound = float(norm_bounds(vector, [slice(None)], np.array([bits], np.uint32))[0])
        assert norm < bound <= max(factor * norm, MIN_NORM_BOUND)


def test_a_sum_of_norm_bounds_does_not_reveal_its_summands():
    """Members of norms 1 and 4 have sums that two members of norm 2.5 have too."""
    random = np.random.default_rng(0)

    def drawn(norm):
        bits = random.integers(0, 2**32, 1, dtype=np.uint32)
        return norm_bounds(np.full(1, norm, np.float32), [slice(0, 1)], bits)[0]

    def sums(norms):
        return np.array([sum(map(drawn, norms)) for _ in range(2000)])

    unlike = sums([1.0, 4.0])
    alike = sums([2.5, 2.5])
    inside = (unlike > alike.min()) & (unlike < alike.max())
    assert len(set(unlike)) == 2000 and inside.mean() > 0.9


def test_norm_bounds_of_zeros_and_of_too_large_values():
    assert norm_bound(np.zeros(5, np.float32)) == 0
    assert norm_bound(np.array([1e-45], np.float32)) == MIN_NORM_BOUND
    assert norm_bound(np.array([2 * MAX_NORM_BOUND], np.float32)) == math.inf
    assert norm_bound(np.array([3e38, 3e38], np.float32)) == math.inf
    assert 3.0 < norm_bound(np.array([np.nan, np.inf, 3.0], np.float32)) < 3.1, "only finite values count"


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("members", [1, 3, 16])
def test_sums_of_the_largest_values_are_not_clipped_and_do_not_overflow(members, alike):
    """A block with a single value that is not zero: equal for all members, or of one member only."""
    for value in (1.0, float(np.nextafter(np.float32(2), np.float32(1))), 1e-20, 1e12):
        vectors = [np.array([value if alike or not i else 0.0, 0.0], np.float32) for i in range(members)]
        total, clipped = summed(vectors, [slice(0, 2)])
        exact = sum(float(vector[0]) for vector in vectors)
        assert clipped == 0 and total[0] == pytest.approx(exact, rel=1e-6, abs=1e-22)


@pytest.mark.parametrize("members", [3, 16])
def test_the_rounding_error_is_as_the_module_states(members):
    """On the longest blocks, where values are smallest compared with their norm."""
    for seeds, limit in ((range(members), 2.2e-7 * members), ([0] * members, 2.2e-7 * math.sqrt(members))):
        vectors = [np.random.default_rng(i).normal(size=BLOCK_VALUES).astype(np.float32) for i in seeds]
        total, clipped = summed(vectors, blocks_of((BLOCK_VALUES,)))
        exact = np.sum(vectors, axis=0, dtype=np.float64)
        assert clipped == 0 and np.sqrt(np.mean((total - exact) ** 2) / np.mean(exact**2)) < limit


def test_tensors_of_very_different_scale_keep_their_precision():
    vectors = [
        np.concatenate([np.full(8, 1e3 + i), np.full(8, 1e-9 * (i + 1)), np.zeros(4)]).astype(np.float32)
        for i in range(3)
    ]
    for tensor_lengths, is_precise in (((8, 8, 4), True), ((20,), False)):
        total, _ = summed(vectors, blocks_of(tensor_lengths))
        assert (np.abs(total[8:16] / 6e-9 - 1).max() < 1e-6) == is_precise
        assert not total[16:].any() or not is_precise


def test_a_bound_that_is_too_small_clips_and_counts():
    out = np.empty(3, np.uint32)
    assert ring.encode(np.array([0.0, 5.0, np.nan], np.float32), 0.0, noise(0), out) == 2 and not out.any()
    assert ring.encode(np.array([0.5, 1e30, np.inf], np.float32), 1.0, noise(0), out) == 2
    decoded = np.empty(3, np.float32)
    ring.decode(out, 1.0, decoded)
    np.testing.assert_allclose(decoded, [0.5, 1.0, 0.0], atol=1e-6)
