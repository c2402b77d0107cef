"""The order of streams on a faked accelerator (tests/fake_cuda): every tier trains as on the CPU, without a
race.
"""

import io
import threading
from contextlib import ExitStack, contextmanager, redirect_stderr
from unittest.mock import patch

import pytest

from fedspeed.engine.config import EngineConfig
from tests.engine.engines import engine
from tests.engine.sealed_stores import BLOCKS, ORDER, RIGHT, a_pass, sealed_store
from tests.limits import LIMIT_S
from tests.processes import Scenarios, run_clusters
from tests.tiny import random_step, write_llama

OFFLOADED = {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}
SETTINGS = {  # of whole engines: tier, options, DeepSpeed settings
    "ram, one slot": ("ram", EngineConfig(block_slots=1), {}),
    "ram, two slots": ("ram", EngineConfig(block_slots=2), {}),
    "ram, a slot for each block": ("ram", EngineConfig(block_slots=9), {}),
    "ram, a block resident": ("ram", EngineConfig(block_slots=1, resident_blocks=1), {}),
    "nvme, two slots": ("nvme", EngineConfig(block_slots=2), {}),
    "nvme, a budget": ("nvme", EngineConfig(base_gib=1.0), {}),
    "client": ("client", EngineConfig(block_slots=2), {}),
    "client, slices in host memory": ("client", EngineConfig(block_slots=3), OFFLOADED),
}
STEPS = 2  # of each engine, each under another schedule


@contextmanager
def world():
    import torch

    from fedspeed.engine.world import join_world, leave_world, quiet

    torch.set_num_threads(1)
    quiet()
    join_world(LIMIT_S)
    try:
        yield
    finally:
        leave_world()


def trained(client_engine, seeded=lambda schedule: None) -> list[float]:
    """Return the losses of steps of two micro-batches, with an evaluation in between."""
    client_engine.load(client_engine.state())
    losses = []
    for i in range(STEPS):
        seeded(i)
        losses.append(client_engine.train_step([random_step(i, 2, 2)], 0.05)[0].loss)
        if i == 0:
            losses.append(client_engine.evaluate([random_step(9, 2, 1).micro])[0].loss)
    return losses


def engine_on_fake(base, folder, number, setting):
    """Return (losses, races, deferred copies) of an engine."""
    from tests.fake_cuda import fake_cuda

    kind, options, extra = setting
    with fake_cuda() as fake:
        with engine(base, kind, nvme=folder, options=options, join=False, **extra) as client_engine:
            losses = trained(client_engine, lambda i: fake.reseed(100 * number + i))
            client_engine.close()
        return losses, fake.races, fake.copies


def stores(kind, slots, folder, schedules, broken=(), *, chance=None):
    """Return (schedules with a wrong sum, schedules with a race) of `schedules` seeds, with the functions in
    `broken` replaced.
    """
    from tests.fake_cuda import fake_cuda

    wrong = 0
    races = 0
    for seed in range(schedules):
        with fake_cuda(seed, chance=chance) as fake, ExitStack() as stack:
            for owner, name, value in broken:
                stack.enter_context(patch.object(owner, name, value))
            store, parameters = sealed_store(kind, slots, folder)
            sums = [a_pass(store, parameters) for _ in range(2)]
            store.close()
        wrong += any(float(found) != pytest.approx(RIGHT, rel=1e-6) for found in sums)
        races += bool(fake.races)
    return wrong, races


def broken_parts():
    """Return for each kind of wait that could be missing: the tier, and the replacements that remove the
    wait.
    """
    from fedspeed.engine.base import copies, gathered, node

    whole = copies.copy_in_stream
    return {
        "a slot is overwritten before it is free": (
            "ram",
            [
                (
                    copies,
                    "copy_in_stream",
                    lambda stream, into, source, free: whole(stream, into, source, None),
                )
            ],
        ),
        "a block is computed with before it has come": (
            "ram",
            [(copies.StreamCopy, "wait", lambda self: self._nbytes)],
        ),
        "a stage is read into before it has been copied": (
            "nvme",
            [(node._StagingBuffer, "settle", lambda self: None)],
        ),
        "a gather is not waited for": ("divided", [(gathered._Gathered, "wait", lambda self: self._nbytes)]),
    }


def locked_pages(folder, broken=()):
    """Return the numbers of page-locked regions while a store of node RAM is open and after it is closed, and
    the races.
    """
    from tests.fake_cuda import fake_cuda

    with fake_cuda() as fake, ExitStack() as stack:
        for place in broken:
            stack.enter_context(patch.object(*place))
        store, parameters = sealed_store("ram", 2, folder)
        counts = [len(fake.registered)]
        a_pass(store, parameters)
        store.begin([3, 4])  # loads are in progress when the store is closed
        store.close()
        counts.append(len(fake.registered))
    return counts, fake.races


def without_pinned_memory(kind, folder):
    """Return (the log, regions still page-locked, races, whether the sums are right) where the driver locks
    less memory than the base takes, or none.
    """
    from tests.fake_cuda import fake_cuda

    def refuse(*_, **__):
        raise RuntimeError("CUDA error: out of memory\nmore lines")

    log = io.StringIO()
    with (
        fake_cuda(lockable_bytes=30_000) as fake,
        redirect_stderr(log),
        patch.object(fake, "pin_memory", refuse),
    ):
        store, parameters = sealed_store(kind, 2, folder)
        registered = len(fake.registered)
        sums = [float(a_pass(store, parameters)) for _ in range(2)]
        store.close()
    # The fake counts ordinary host memory as the device's, so allocating it looks like an operation that must
    # be waited for.
    races = [race for race in fake.races if "aten::empty" not in race]
    return log.getvalue(), registered, races, sums == pytest.approx([RIGHT, RIGHT], rel=1e-6)


def waited(folder):
    """Return (loads, milliseconds that the computation waited for them, waits of the host, seconds reported
    the second time) where a copy is made only when it is waited for.
    """
    from tests.fake_cuda import FakeEvent, fake_cuda

    stops = []
    whole = FakeEvent.synchronize
    with fake_cuda(chance=0.0):
        store, parameters = sealed_store("ram", 2, folder)
        with patch.object(FakeEvent, "synchronize", lambda event: (stops.append(1), whole(event))):
            a_pass(store, parameters)
        loads = store.take_loads()
        again = store.take_loads().waited_s
        store.close()
    return loads.count, loads.waited_s * 1000, len(stops), again


def loaded_again(folder):
    """Return (slots, loads of the first and the second pass) with more slots requested than blocks exist."""
    store, parameters = sealed_store("ram", 99, folder)
    counts = []
    for _ in range(2):
        a_pass(store, parameters)
        counts.append(store.take_loads().count)
    slots = [pool.slots for pool in store._pools]
    store.close()
    return slots, counts


def two_stages(folder):
    """Return whether the next unit is read while the last one is copied, the copies made by then, the order
    of reads and of copies, and the races.
    """
    import torch

    from fedspeed.engine.base import copies as ways
    from fedspeed.engine.base import node
    from tests.fake_cuda import fake_cuda

    reads = []
    copies = []
    made = []
    both = threading.Event()
    read = node.NvmeTier._read
    copy = ways.copy_in_stream

    def reading(self, index, into):
        reads.append(index)
        if len(reads) == 2:
            made.append(fake.copies)
            both.set()
        return read(self, index, into)

    def copying(stream, into, source, free):
        copies.append(int(source[:4].view(torch.float32)[0]) - 1)
        return copy(stream, into, source, free)

    with (
        fake_cuda(chance=0.0) as fake,
        patch.object(node.NvmeTier, "_read", reading),
        patch.object(ways, "copy_in_stream", copying),
    ):
        store, parameters = sealed_store("nvme", 2, folder)
        store.begin(ORDER)  # nobody waits for the first copy, so it is not made
        second = both.wait(LIMIT_S)
        for place, unit in enumerate(ORDER):
            with store.use(unit):
                pass
        store.close()
    return second, made, reads, copies, fake.races


def played(rank, base, folder):
    from fedspeed.engine.base.page_locks import PageLocks

    seen = Scenarios()
    with world():
        with engine(base, "ram", nvme=folder, join=False) as client_engine:
            seen["expected"] = trained(client_engine)
            client_engine.close()
        for number, (name, setting) in enumerate(SETTINGS.items()):
            seen.play(name, engine_on_fake, base, folder, number=number, setting=setting)
        for kind in ("ram", "nvme", "divided", "slices in host memory"):
            seen.play(
                ("alone", kind),
                lambda kind: [stores(kind, slots, folder, 4) for slots in (1, 2, 3, BLOCKS)],
                kind,
            )
        for name, (kind, broken) in broken_parts().items():
            seen.play(name, stores, kind, 2, folder, schedules=5, broken=broken)
        seen.play("locks", locked_pages, folder)
        seen.play("hasty locks", locked_pages, folder, [(PageLocks, "close", PageLocks._undo)])
        for kind in ("ram", "nvme", "slices in host memory"):
            seen.play(("unpinned", kind), without_pinned_memory, kind, folder)
        seen.play("waited", waited, folder)
        seen.play("loaded again", loaded_again, folder)
        seen.play("two stages", two_stages, folder)
    return seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    base = write_llama(folder / "llama", hidden=32, intermediate=64, layers=3)
    return run_clusters([1], played, base, folder / "disk")[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_an_engine_trains_as_on_the_cpu_under_every_schedule(seen, name):
    losses, races, _ = seen[name]
    assert losses == seen["expected"] and races == []


def test_copies_are_really_deferred(seen):
    assert all(seen[name][2] > 0 for name in SETTINGS if not name.startswith("client"))


@pytest.mark.parametrize("kind", ["ram", "nvme", "divided", "slices in host memory"])
def test_a_store_gives_every_unit_its_values_whatever_the_schedule(seen, kind):
    assert seen["alone", kind] == [(0, 0)] * 4


@pytest.mark.parametrize(
    "name",
    [
        "a slot is overwritten before it is free",
        "a block is computed with before it has come",
        "a stage is read into before it has been copied",
        "a gather is not waited for",
    ],
)
def test_the_check_bites_where_a_wait_is_missing(seen, name):
    wrong, races = seen[name]
    assert races == 5, "every schedule shows the race, whatever its numbers"
    if name == "a block is computed with before it has come":  # in the others threads decide, not the seed
        assert wrong > 0, "and some give wrong ones"


def test_page_locks_are_undone(seen):
    counts, races = seen["locks"]
    assert counts == [BLOCKS + 1, 0] and races == []
    assert "memory is unregistered while copy_" in seen["hasty locks"][1][0], "the check bites"


@pytest.mark.parametrize(
    "kind,error",
    [
        ("ram", "CUDA error 2"),
        ("nvme", "CUDA error: out of memory"),
        ("slices in host memory", "CUDA error: out of memory"),
    ],
)
def test_a_refusal_of_pinned_memory_is_logged_once_and_changes_no_result(seen, kind, error):
    import socket

    log, registered, races, right = seen["unpinned", kind]
    assert (
        log.count("\n") == 1
        and f"{socket.gethostname()}: 0.00 GiB for " in log
        and f"cannot be page-locked ({error})" in log
    )
    assert "ulimit -l unlimited" in log and registered == 0 and races == [] and right


def test_the_device_says_how_long_it_waited_and_the_host_does_not_stop_for_that(seen):
    count, ms, stops, again = seen["waited"]
    assert count > BLOCKS and ms == pytest.approx(count) and stops == 0 and again == 0.0


def test_with_a_slot_for_each_block_nothing_is_loaded_twice(seen):
    slots, counts = seen["loaded again"]
    assert slots == [BLOCKS, 1] and counts == [BLOCKS + 1, 0]


def test_the_next_unit_is_read_while_the_last_is_copied_and_in_order(seen):
    second, made, reads, copies, races = seen["two stages"]
    assert second and made == [0], "the second read began before the first copy was made"
    assert reads == copies and reads[:3] == [0, 1, BLOCKS] and races == []
