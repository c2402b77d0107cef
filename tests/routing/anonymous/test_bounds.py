"""The spans of fixed-point sums: no honest value is ever beyond one, and little is lost by them."""

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
    """(sum of fixed-point vectors, spans, values that were clipped), as an exchange of these members computes
    it.
    """
    bits = np.random.default_rng(len(vectors)).integers(
        0, 2**32, (len(vectors), len(blocks)), dtype=np.uint32
    )
    spans = sum(norm_bounds(vector, blocks, own) for vector, own in zip(vectors, bits))
    words = np.zeros(len(vectors[0]), np.uint32)
    clipped = 0
    for i, vector in enumerate(vectors):
        own = np.empty(len(vector), np.uint32)
        clipped += sum(
            ring.encode(vector[b], span, noise([i, k]), own[b])
            for k, (b, span) in enumerate(zip(blocks, spans))
        )
        words += own
    total = np.empty(len(words), np.float32)
    for b, span in zip(blocks, spans):
        ring.decode(words[b], span, total[b])
    return total, spans, clipped


def test_parts_are_cut_into_blocks_of_one_part_each():
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
def test_a_size_bounds_the_norm(values):
    norm = math.hypot(*values)
    for bits, most in ((0, 1.02), (2**31, 1.44), (2**32 - 1, 2.03)):
        size = float(norm_bounds(np.array(values, np.float32), [slice(None)], np.array([bits], np.uint32))[0])
        assert norm < size <= max(most * norm, MIN_NORM_BOUND)


def test_a_sum_of_sizes_does_not_tell_its_summands():
    """A member of norm 1 beside one of norm 4 gives sums that two of norm 2.5 give too."""
    random = np.random.default_rng(0)

    def sums(norms):
        vectors = [np.full(1, norm, np.float32) for norm in norms]
        return np.array([
            sum(
                norm_bounds(v, [slice(0, 1)], random.integers(0, 2**32, 1, dtype=np.uint32))[0]
                for v in vectors
            )
            for _ in range(2000)
        ])

    unlike = sums([1.0, 4.0])
    alike = sums([2.5, 2.5])
    inside = (unlike > alike.min()) & (unlike < alike.max())
    assert len(set(unlike)) == 2000 and inside.mean() > 0.9


def test_sizes_of_nothing_and_of_too_much():
    assert norm_bound(np.zeros(5, np.float32)) == 0
    assert norm_bound(np.array([1e-45], np.float32)) == MIN_NORM_BOUND
    assert norm_bound(np.array([2 * MAX_NORM_BOUND], np.float32)) == math.inf
    assert norm_bound(np.array([3e38, 3e38], np.float32)) == math.inf
    assert 3.0 < norm_bound(np.array([np.nan, np.inf, 3.0], np.float32)) < 3.1, (
        "what is no number does not count"
    )


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("members", [1, 3, 16])
def test_sums_of_the_largest_values_are_not_clipped_and_do_not_overflow(members, alike):
    """All of a block in one value; all members' of the same sign, or all of one member's."""
    for value in (1.0, float(np.nextafter(np.float32(2), np.float32(1))), 1e-20, 1e12):
        vectors = [np.array([value if alike or not i else 0.0, 0.0], np.float32) for i in range(members)]
        total, _, clipped = summed(vectors, [slice(0, 2)])
        assert clipped == 0 and total[0] == pytest.approx(
            sum(float(v[0]) for v in vectors), rel=1e-6, abs=1e-22
        )


@pytest.mark.parametrize("members", [3, 16])
def test_rounding_stays_far_below_what_an_update_is(members):
    """The bound that the module states, on the longest blocks, where values are small beside their norm."""
    for seeds, most in ((range(members), 2.2e-7 * members), ([0] * members, 2.2e-7 * math.sqrt(members))):
        vectors = [np.random.default_rng(i).normal(size=BLOCK_VALUES).astype(np.float32) for i in seeds]
        total, _, clipped = summed(vectors, blocks_of((BLOCK_VALUES,)))
        exact = np.sum(vectors, axis=0, dtype=np.float64)
        assert clipped == 0 and np.sqrt(np.mean((total - exact) ** 2) / np.mean(exact**2)) < most


def test_parts_of_very_different_size_keep_their_digits():
    vectors = [
        np.concatenate([np.full(8, 1e3 + i), np.full(8, 1e-9 * (i + 1)), np.zeros(4)]).astype(np.float32)
        for i in range(3)
    ]
    for parts, good in (((8, 8, 4), True), ((20,), False)):
        total, _, _ = summed(vectors, blocks_of(parts))
        assert (np.abs(total[8:16] / 6e-9 - 1).max() < 1e-6) == good
        assert not total[16:].any() or not good


def test_a_span_that_was_lied_about_clips_and_counts():
    out = np.empty(3, np.uint32)
    assert ring.encode(np.array([0.0, 5.0, np.nan], np.float32), 0.0, noise(0), out) == 2 and not out.any()
    assert ring.encode(np.array([0.5, 1e30, np.inf], np.float32), 1.0, noise(0), out) == 2
    came = np.empty(3, np.float32)
    ring.decode(out, 1.0, came)
    np.testing.assert_allclose(came, [0.5, 1.0, 0.0], atol=1e-6)
