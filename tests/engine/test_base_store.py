"""Where the frozen base is stored: the order of loads, the files that ranks of a node share, and the errors
where memory or disk are too small.
"""

import os
import signal
import subprocess
import sys
import time

import pytest

from fedspeed.schedule.loads import next_load, step_order
from tests.conftest import ROOT
from tests.engine.engines import engine
from tests.limits import LIMIT_S
from tests.processes import run_clusters
from tests.tiny import random_step, write_llama


def simulate(blocks: int, slots: int, passes: int) -> list[list[int]]:
    """Return the units loaded in each forward and backward pass when loads run ahead as far as they may."""
    step = [*range(blocks), *range(blocks - 1, -1, -1)]
    order = step * (passes + 1)
    loaded_units = []
    loaded = []
    for start in range(0, passes * len(step), len(step)):
        loaded.append([])
        for i in range(start, start + len(step)):
            for busy, upcoming in ((set(), order[i:]), ({order[i]}, order[i + 1 :])):
                while choice := next_load(upcoming, loaded_units, busy, slots):
                    unit, victim = choice
                    assert victim not in busy and (victim is None) == (len(loaded_units) < slots)
                    if victim is not None:
                        loaded_units.remove(victim)
                    loaded_units.append(unit)
                    loaded[-1].append(unit)
            assert order[i] in loaded_units, "a unit in use must be loaded"
    return loaded


@pytest.mark.parametrize("blocks,slots", [(5, 1), (5, 2), (8, 2), (8, 3), (8, 7), (4, 4), (1, 2)])
def test_a_step_loads_what_the_turns_do_not_keep(blocks, slots):
    first, *others = simulate(blocks, slots, 4)
    assert {len(loads) for loads in others} == {2 * max(0, blocks - slots)}
    assert len(first) <= 2 * blocks


@pytest.mark.parametrize("lowest", [0, 3])
def test_a_block_comes_back_to_the_slot_where_its_graph_was_built(lowest):
    """A graph that is kept until the backward pass must find the weights of its block in the same slot, in
    training steps with and without evaluations in between.
    """
    for blocks in range(2, 13):
        step = step_order(blocks, min(lowest, blocks - 1))
        forward = list(range(blocks))
        for slots in range(1, blocks + 1):
            places = {}
            free = list(range(slots))
            for order in (step, forward, step, step, forward, forward, step):
                first = {}
                for i, block in enumerate(order):
                    for busy, upcoming in (
                        (set(), order[i:] + forward),
                        ({block}, order[i + 1 :] + forward),
                        (set(), order[i + 1 :] + forward),
                    ):
                        while choice := next_load(upcoming, places.keys(), busy, slots):
                            unit, victim = choice
                            places[unit] = free.pop() if victim is None else places.pop(victim)
                        if busy:
                            assert first.setdefault(block, places[block]) == places[block], (
                                blocks,
                                slots,
                                block,
                            )


def test_the_unit_that_is_needed_last_makes_room():
    assert next_load([3, 1, 2], loaded=[1, 2], busy=[], slots=2) == (3, 2)
    assert next_load([3, 1, 2], loaded=[1, 2], busy=[2], slots=2) == (3, 1)
    assert next_load([3, 1], loaded=[1, 9], busy=[], slots=2) == (3, 9), "what is never used again goes first"
    assert next_load([1, 2, 3], loaded=[1, 2], busy=[], slots=2) is None, (
        "nothing goes that is needed before what would come"
    )
    assert next_load([1, 2], loaded=[1], busy=[1], slots=2) == (2, None)
    assert next_load([1], loaded=[1], busy=[], slots=1) is None


# Files of a node.


def shared_file(rank, folder):
    import torch

    from fedspeed.engine.base.node_file import NodeFile
    from fedspeed.engine.world import join_world, leave_world, quiet

    quiet()
    join_world(LIMIT_S)
    try:
        file = NodeFile(10_000, folder, torch.distributed.group.WORLD)
        file.write(5_000, torch.full((100,), 7, dtype=torch.uint8))
        file.settle()
        seen = file.map()
        inode = os.fstat(file.fd).st_ino
        return file.writes, inode, int(seen.sum()), int(seen[5_000]), os.listdir(folder) if folder else []
    finally:
        leave_world()


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_ranks_of_a_node_share_one_file_without_a_name(tmp_path, where):
    one, two = run_clusters([2], shared_file, tmp_path if where == "disk" else None)
    assert (one[0], two[0]) == (True, False), "one rank writes"
    assert one[1:] == two[1:] and one[2:] == (700, 7, [])


def test_kill_9_leaves_nothing_on_the_disk(tmp_path):
    script = (
        f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "from fedspeed.engine.base.node_file import _anonymous\n"
        f"fd = _anonymous(50_000_000, Path({str(tmp_path)!r}))\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)"
    )
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )
    try:
        while (line := process.stdout.readline()) and "ready" not in line:
            pass
        assert line
        process.send_signal(signal.SIGKILL)
        process.wait(LIMIT_S)
    finally:
        process.kill()
    assert list(tmp_path.iterdir()) == []
    end = time.monotonic() + LIMIT_S
    while os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize < free - 40_000_000:
        assert time.monotonic() < end, "the space was not given back"
        time.sleep(0.2)


class Memory:
    """Memory with `free` bytes left, of a machine that frees `growth` more bytes each time a piece is taken,
    `left` times.
    """

    def __init__(self, free: int, growth: int = 0, left: int = 0):
        self.bytes = free
        self._growth = growth
        self._left = left
        self.taken = []

    def free(self) -> int:
        return self.bytes

    def take(self, at: int, size: int) -> None:
        assert size <= self.bytes and at == sum(self.taken)
        self.taken.append(size)
        self.bytes -= size
        if self._left:
            self.bytes = self.bytes + self._growth
            self._left = self._left - 1


def test_memory_that_grows_while_it_is_used_can_be_reserved():
    from fedspeed.engine.base.node_file import reserve

    grows = Memory(25, growth=10, left=9)
    whole = Memory(35)
    reserve(35, grows.free, grows.take, piece=10)
    reserve(35, whole.free, whole.take, piece=10)
    assert grows.taken == whole.taken == [10, 10, 10, 5]


@pytest.mark.parametrize("memory", [Memory(25), Memory(5, growth=10, left=9), Memory(12, growth=8, left=1)])
def test_too_little_memory_is_refused_with_the_free_amount(memory):
    from fedspeed.engine.base.node_file import reserve
    from fedspeed.errors import FedSpeedError

    there = memory.bytes + (8 if memory.bytes == 12 else 0)
    with pytest.raises(
        FedSpeedError,
        match=f"the base takes 35.00 GiB of RAM and {there}.00 GiB are free; "
        f"free some, or set engine.tier=nvme",
    ):
        reserve(
            35 << 30,
            lambda: memory.free() << 30,
            lambda at, size: memory.take(at >> 30, size >> 30),
            piece=10 << 30,
        )


def test_what_was_reserved_is_given_back_where_there_is_no_more(monkeypatch):
    import fedspeed.engine.base.node_file as shared
    from fedspeed.errors import FedSpeedError

    left = iter([2 << 30, 1000])
    monkeypatch.setattr(shared, "free_memory", lambda: next(left))
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(shared.os, "posix_fallocate", lambda fd, at, size: None)
    with pytest.raises(FedSpeedError, match="1.00 GiB are free"):
        shared._anonymous(2 << 30, None)
    assert os.listdir("/proc/self/fd") == before


def without_room(rank, base, kind, folder):
    import fedspeed.engine.base.node_file as shared
    from fedspeed.errors import FedSpeedError

    if rank == 0:  # the rank that reserves; the others must get the error instead of waiting
        shared.free_memory = lambda: 1000
    try:
        with engine(base, kind, nvme=folder, clients=[(0,), (1,)]):
            return "built"
    except FedSpeedError as error:
        return str(error)


def test_every_rank_gets_the_error_when_there_is_no_room(tmp_path):
    base = write_llama(tmp_path / "llama")
    messages = run_clusters([2], without_room, base, "ram", tmp_path / "disk")
    assert messages[0] == messages[1]
    assert (
        "GiB of RAM" in messages[0]
        and "0.00 GiB are free" in messages[0]
        and "engine.tier=nvme" in messages[0]
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_reported_and_left_as_it_was(tmp_path):
    base = write_llama(tmp_path / "llama")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False).returncode:
        pytest.skip("no mount in this container")
    try:
        messages = run_clusters([2], without_room, base, "nvme", disk)
        assert messages[0] == messages[1] and str(disk) in messages[0] and "No space left" in messages[0]
        assert [p for p in disk.rglob("*") if p.is_file()] == [] and os.statvfs(disk).f_bfree == os.statvfs(
            disk
        ).f_blocks
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def shortened(rank, base, folder):
    """Return the message when the file of the base is cut off during a run."""
    from fedspeed.errors import FedSpeedError

    with engine(base, "nvme", nvme=folder) as client_engine:
        client_engine.load(client_engine.state())
        client_engine.train_step([random_step(1, 2, 1)], 1e-3)
        tier = next(t for t in client_engine.store._tiers if t.name == "nvme")
        os.ftruncate(tier._file.fd, tier._at[2] + 4096)  # within a block, behind the embedding
        try:
            client_engine.train_step([random_step(1, 2, 1)], 1e-3)
            client_engine.train_step([random_step(1, 2, 1)], 1e-3)
        except FedSpeedError as error:
            return str(error)
        return "trained on"


def test_a_base_that_was_cut_on_disk_is_noticed(tmp_path):
    base = write_llama(tmp_path / "llama", layers=5)
    [message] = run_clusters([1], shortened, base, tmp_path)
    assert message.startswith("the base on disk ends before byte")


def short_of_memory(rank, base, kind, folder):
    """Return the message where memory ends while the base is loaded, and the files that are left."""
    import resource
    from pathlib import Path

    from fedspeed.errors import FedSpeedError
    from fedspeed.session.explain import out_of_memory

    with engine(base, "zero0"):  # all libraries in use once
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (120 << 20), resource.RLIM_INFINITY))
        try:
            with engine(base, kind, nvme=folder, join=False):
                return "built"
        except FedSpeedError as error:
            return str(error), [p.name for p in folder.rglob("*") if p.is_file()]
        except (MemoryError, OSError, RuntimeError) as error:
            return str(error) if out_of_memory(error) else f"not seen to be memory: {error!r}"
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize("kind", ["ram", "resident", "zero0"])
def test_a_limit_of_memory_reached_while_loading_is_seen_to_be_one(tmp_path, kind):
    base = write_llama(tmp_path / "llama", hidden=1024, intermediate=2816, layers=4, vocab=4096)
    [message] = run_clusters([1], short_of_memory, base, kind, tmp_path / "disk")
    if kind == "ram":
        assert "of RAM and" in message[0] and message[1] == []
    else:
        assert "allocate memory" in message or "Cannot allocate" in message or message == "", message


def test_limits_of_control_groups_are_known_in_both_versions(tmp_path):
    from fedspeed.cluster.devices import _group_limits

    for folder, names, values in (
        ("a/b", ("memory.max", "memory.current"), ("900", "100")),
        ("a", ("memory.max", "memory.current"), ("max", "5")),
        ("memory/job", ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("800", "300")),
    ):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, value in zip(names, values):
            (tmp_path / folder / name).write_text(f"{value}\n")
    assert list(_group_limits("0::/a/b\n", tmp_path)) == [(900, 100)]
    assert list(_group_limits("5:cpu:/x\n4:memory,hugetlb:/job\n0::/\n", tmp_path)) == [(800, 300)]


def cut_shard(rank, base, kind, folder):
    """Return the message about truncated weights, and the files that the store leaves."""
    from fedspeed.errors import ModelError

    try:
        with engine(base, kind, nvme=folder):
            return "built"
    except ModelError as error:
        return str(error), [p.name for p in folder.rglob("*") if p.is_file()]


@pytest.mark.parametrize("kind", ["ram", "nvme"])
def test_a_truncated_shard_is_named_and_leaves_no_partial_state(tmp_path, kind):
    from pathlib import Path

    base = write_llama(tmp_path / "llama")
    weights = Path(base) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])
    [(message, left)] = run_clusters([1], cut_shard, base, kind, tmp_path / "disk")
    assert str(weights) in message and "truncated" in message and left == []
