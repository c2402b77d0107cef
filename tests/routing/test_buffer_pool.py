"""The buffer pool: it never reuses memory that any array refers to, and holds little more than was needed at
once.
"""

import gc
import threading

import numpy as np
import pytest

from fedspeed.routing.buffer_pool import MIN_BYTES, BufferPool

N = 4 * MIN_BYTES


def address_of(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_without_references_is_reused():
    pool = BufferPool()
    first = pool.take(N)
    at = address_of(first)
    del first
    again = pool.take(3, N // 4, dtype=np.uint8)
    assert address_of(again) == at and again.shape == (3, N // 4) and pool.allocated_bytes == N


@pytest.mark.parametrize(
    "part",
    [
        lambda a: a[5:9],
        lambda a: a.view(np.uint32),
        lambda a: memoryview(a),
        lambda a: np.frombuffer(a, np.uint16),
        lambda a: [a[:3]],
        lambda a: a.reshape(4, -1)[1],
    ],
)
def test_memory_with_a_reference_to_any_view_is_not_reused(part):
    pool = BufferPool()
    first = pool.take(N)
    at = address_of(first)
    held = part(first)
    del first
    assert address_of(pool.take(N)) != at
    del held
    gc.collect()
    addresses = {address_of(a) for a in [pool.take(N), pool.take(N)]}
    assert at in addresses


def test_it_never_holds_more_than_was_needed_at_once():
    pool = BufferPool()
    for size in range(N, 40 * N, N):
        pool.take(size)
        assert pool.allocated_bytes == size
    pool.clear()
    assert pool.allocated_bytes == 0 and pool.take(10).nbytes == 10 and pool.allocated_bytes == 0


def test_a_small_need_does_not_get_a_large_piece():
    pool = BufferPool()
    pool.take(20 * N)
    assert pool.take(N, dtype=np.uint8).base.nbytes <= 2 * N


def test_small_blocks_and_large_ones_use_the_same_memory_in_turn():
    pool = BufferPool()
    pool.take(8 * N)
    for _ in range(3):
        small = [pool.take(N) for _ in range(8)]
        assert len({address_of(block) for block in small}) == 8 and pool.allocated_bytes == 8 * N
        del small[3:5], small[0]  # gaps that are not beside each other
        both = pool.take(2 * N)
        del small, both
        whole = pool.take(8 * N)
        assert pool.allocated_bytes == 8 * N
        del whole


def test_blocks_in_use_never_overlap():
    pool = BufferPool()
    random = np.random.default_rng(0)
    blocks: list[np.ndarray] = []
    for step in range(400):
        block = pool.take(int(random.integers(MIN_BYTES, 4 * N)))
        block[:] = step % 251
        blocks.append(block)
        del block
        if len(blocks) > 12:
            del blocks[int(random.integers(len(blocks)))]
        first = {int(block[0]) for block in blocks}
        assert len(first) == len(blocks)
    assert all((block == block[0]).all() for block in blocks)
    spans = sorted((address_of(block), block.nbytes) for block in blocks)
    assert all(at + size <= after for (at, size), (after, _) in zip(spans, spans[1:]))


def test_threads_never_share_a_piece():
    pool = BufferPool()
    wrong = []

    def use(number):
        for _ in range(300):
            mine = pool.take(N)
            mine[:] = number
            if not (mine == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and pool.allocated_bytes <= 12 * N
