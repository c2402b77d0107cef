"""Ranks that find each other over a real TCP store, as processes or as threads of this process."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed  # noqa: F401 - importing it in the first rank would count as that rank's delay

from fedspeed.cluster.discover import Launch
from fedspeed.cluster.hostfile import Host
from fedspeed.cluster.rendezvous import Peer, Store, leave, meet, publish, published
from fedspeed.cluster.topology import place_clients
from fedspeed.cluster.torch_world import torch_world_env
from fedspeed.errors import HostfileError, LostPeerError
from fedspeed.net.ports import STORE_PORT_OFFSET
from tests.limits import LIMIT_S
from tests.processes import free_port

ROOT = Path(__file__).parents[2]
HOSTS = (Host("alpha", 2, "fast"), Host("beta", 1, "slow"))

RANK_SCRIPT = Path(__file__).parent / "rendezvous_rank.py"


def launch_of(rank, port, hosts=HOSTS, kind="openmpi"):
    size = sum(host.slots for host in hosts)
    return Launch(
        kind,
        rank,
        size,
        local_rank=rank,
        hostfile=None,
        hosts=hosts,
        master_addr="127.0.0.1",
        master_port=port,
    )


def in_threads(work, ranks=3):
    """Run work(rank) in a thread per rank and return the results; an exception is a result."""
    results = [None] * ranks

    def run(rank):
        try:
            results[rank] = work(rank)
        except Exception as error:  # noqa: BLE001 - handed to the test
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive(), "a rank hangs"
    return results


@pytest.fixture
def port():
    return free_port(1 + STORE_PORT_OFFSET)


def test_three_processes_meet_and_each_cluster_gets_a_torch_world_of_its_own(tmp_path, port):
    hostfile = tmp_path / "hosts"
    hostfile.write_text(
        "alpha slots=2\nbeta slots=1\n# fed-host alpha cluster=fast\n# fed-host beta cluster=slow\n"
    )
    base = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("OMPI", "PMIX", "SLURM", "PMI", "RANK", "WORLD"))
    }
    processes = []
    for rank in range(3):
        env = {
            **base,
            "PYTHONPATH": str(ROOT),
            "RANK": str(rank),
            "WORLD_SIZE": "3",
            "LOCAL_RANK": str(rank),
            "LOCAL_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, str(RANK_SCRIPT), str(hostfile)], env=env, stdout=subprocess.PIPE, text=True
            )
        )
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0, 0]
    answers = [json.loads(output.splitlines()[-1]) for output in outputs]
    assert [answer["sum"] for answer in answers] == [3.0, 3.0, 3.0], (
        "1 + 2 in cluster fast, 3 alone in cluster slow"
    )
    assert all(answer["pids"] == [process.pid for process in processes] for answer in answers)
    assert all(answer["seen"] == [0, 1, 2] for answer in answers)
    worlds = [answer["world"] for answer in answers]
    assert [(world["RANK"], world["WORLD_SIZE"]) for world in worlds] == [("0", "2"), ("1", "2"), ("0", "1")]
    assert [(world["LOCAL_RANK"], world["LOCAL_SIZE"]) for world in worlds] == [
        ("0", "3"),
        ("1", "3"),
        ("2", "3"),
    ]
    assert {(world["CROSS_RANK"], world["CROSS_SIZE"]) for world in worlds} == {("0", "1")}
    assert worlds[0]["MASTER_PORT"] == worlds[1]["MASTER_PORT"] != str(port)
    assert "MASTER_PORT" not in worlds[2], "a world of one rank has no store on the network"
    assert not any(answer["stolen"] for answer in answers), "the port was open before it was published"
    stores = [port + STORE_PORT_OFFSET, int(worlds[0]["MASTER_PORT"])]
    assert all(["127.0.0.1", store] in answers[0]["listening"] for store in stores)
    assert {address for answer in answers for address, _ in answer["listening"]} == {"127.0.0.1"}


def test_local_ranks_get_a_port_that_no_other_process_can_take(tmp_path):
    """Rank 0 comes last, as on a busy machine; who watches for the number of the port comes too late to take
    it.
    """
    file = tmp_path / "meeting"
    thefts = []

    def steal():
        while not file.exists():
            time.sleep(0.001)
        with socket.socket() as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            thefts.append(thief.connect_ex(("127.0.0.1", int(file.read_text()))))

    def work(rank):
        if rank == 3:
            return steal()
        time.sleep(0.5 if rank == 0 else 0)
        store = meet(replace(launch_of(rank, 0, kind="local"), port_file=file), LIMIT_S)
        return leave(store, LIMIT_S)

    assert in_threads(work, ranks=4) == [set(), set(), set(), None]
    assert thefts == [0], "somebody listens there already"


def test_a_rank_0_that_publishes_no_port_is_named(tmp_path):
    with pytest.raises(
        LostPeerError, match=r"rank 0 \(host alpha, slot 0\) did not open a meeting port within 1 s"
    ):
        meet(replace(launch_of(1, 0, kind="local"), port_file=tmp_path / "port"), 1)


def test_the_missing_are_named_at_the_deadline(port, capfd):
    started = time.monotonic()
    first, second = in_threads(lambda rank: meet(launch_of(rank, port), 4), ranks=2)
    assert time.monotonic() - started < LIMIT_S / 10
    assert capfd.readouterr().err == ""
    for error in (first, second):
        assert isinstance(error, LostPeerError)
        assert "1 of 3 ranks did not arrive" in str(error)
        assert "rank 2 (host beta, slot 0)" in str(error)
        assert "cluster.start_timeout_s" in str(error)
        assert error.exit_code == 75


def test_a_missing_rank_0_is_named_without_a_stack_trace(port, capfd):
    with pytest.raises(
        LostPeerError,
        match=rf"rank 0 \(host alpha, slot 0\) did not open 127.0.0.1:{port + STORE_PORT_OFFSET} within 1 s",
    ):
        meet(launch_of(1, port), 1)
    assert capfd.readouterr().err == ""


def test_a_host_of_rank_0_that_nobody_knows_is_refused(monkeypatch, port):
    monkeypatch.setattr("fedspeed.cluster.store_connection._RESOLVE_S", 0.2)
    with pytest.raises(HostfileError, match=r"cannot resolve .*`no-such-host.invalid`.*MASTER_ADDR"):
        meet(replace(launch_of(1, port), master_addr="no-such-host.invalid"), LIMIT_S)


def test_a_taken_port_is_reported_with_a_remedy(port):
    with socket.create_server(("", port + STORE_PORT_OFFSET)):
        with pytest.raises(
            LostPeerError, match=rf"meeting port {port + STORE_PORT_OFFSET} .*in use.*MASTER_PORT=\d+"
        ):
            meet(launch_of(0, port), 2)


def test_ranks_that_found_different_hosts_are_refused(port):
    other = (replace(HOSTS[0], gpu="A"), HOSTS[1])
    results = in_threads(lambda rank: meet(launch_of(rank, port, other if rank == 2 else HOSTS), LIMIT_S))
    assert all(
        isinstance(result, HostfileError) and "rank 2" in str(result) and "--hostfile FILE" in str(result)
        for result in results
    )


def machines(monkeypatch, names):
    """Make each rank of this process read its name in `names` as the host name of its machine."""
    monkeypatch.setattr(
        "fedspeed.cluster.rendezvous.socket.gethostname", lambda: names[int(threading.current_thread().name)]
    )


def named_threads(work, ranks=3):
    def run(rank):
        threading.current_thread().name = str(rank)
        return work(rank)

    return in_threads(run, ranks)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["m1", "m2", "m2"], "ranks 0 and 1 belong to host alpha, but run on m1 and m2"),
        (["beta", "beta", "alpha"], "rank 0 belongs to host alpha, but runs on beta"),
    ],
)
def test_ranks_that_run_elsewhere_than_planned_are_refused(monkeypatch, port, names, says):
    machines(monkeypatch, names)
    for result in named_threads(lambda rank: meet(launch_of(rank, port), LIMIT_S)):
        assert isinstance(result, HostfileError)
        assert says in str(result)


@pytest.mark.parametrize(
    "names",
    [["alpha", "alpha", "beta.lab"], ["vm", "vm", "vm"], ["alpha", "alpha", "alpha"], ["x", "x", "y"]],
)
def test_machines_that_fit_the_plan_are_accepted(monkeypatch, port, names):
    machines(monkeypatch, names)
    for result in named_threads(lambda rank: meet(launch_of(rank, port), LIMIT_S)):
        assert isinstance(result, Store), result
        assert [peer.hostname for peer in result.peers] == names


def test_a_cluster_over_two_machines_counts_them(monkeypatch, port):
    machines(monkeypatch, ["alpha", "alpha", "beta"])
    hosts = (Host("alpha", 2), Host("beta", 1))
    topology = place_clients(hosts, 3, "auto")

    def work(rank):
        launch = replace(launch_of(rank, port, hosts), local_rank=rank % 2)
        store = meet(launch, LIMIT_S)
        world = torch_world_env(
            store, topology.cluster_of(topology.placement(rank).cluster).ranks, launch, LIMIT_S
        )
        assert leave(store, LIMIT_S) == set()
        return world

    worlds = named_threads(work)
    crossed = [(world["CROSS_RANK"], world["CROSS_SIZE"], world["LOCAL_SIZE"]) for world in worlds]
    assert crossed == [("0", "2", "2"), ("0", "2", "2"), ("1", "2", "1")]
    assert {world["MASTER_ADDR"] for world in worlds} == {"127.0.0.1"}


def test_machines_with_the_same_host_name_are_distinguished(monkeypatch, port):
    """`hostname` is often without its domain: gpu1 at one organisation, and gpu1 at another."""
    machines(monkeypatch, ["gpu1", "gpu1", "gpu1"])
    monkeypatch.setattr(
        "fedspeed.cluster.rendezvous._boot_id", lambda: "b" if threading.current_thread().name == "2" else "a"
    )
    hosts = (Host("gpu1.site-a.org", 2), Host("gpu1.site-b.org", 1))
    ranks = place_clients(hosts, 3, "auto").clusters[0].ranks

    def work(rank):
        launch = replace(launch_of(rank, port, hosts), local_rank=rank % 2)
        store = meet(launch, LIMIT_S)
        world = torch_world_env(store, ranks, launch, LIMIT_S)
        assert leave(store, LIMIT_S) == set()
        return world

    worlds = named_threads(work)
    assert [(world["CROSS_RANK"], world["CROSS_SIZE"], world["LOCAL_SIZE"]) for world in worlds] == [
        ("0", "2", "2"),
        ("0", "2", "2"),
        ("1", "2", "1"),
    ]
    swapped = (Host("gpu1.site-a.org", 1), Host("gpu1.site-b.org", 2))
    second = free_port() - STORE_PORT_OFFSET
    for result in named_threads(lambda rank: meet(launch_of(rank, second, swapped), LIMIT_S)):
        assert isinstance(result, HostfileError)
        assert (
            "ranks 1 and 2 belong to host gpu1.site-b.org, but run on two machines that are both called gpu1"
            in str(result)
        )


def test_machines_that_differ_in_the_domain_only(monkeypatch, port):
    hosts = (Host("gpu1.site-a.org", 2), Host("gpu1.site-b.org", 1))
    machines(monkeypatch, ["gpu1.site-a.org", "gpu1.site-a.org", "gpu1.site-b.org"])
    for result in named_threads(lambda rank: meet(launch_of(rank, port, hosts), LIMIT_S)):
        assert isinstance(result, Store), result


def test_a_cluster_whose_first_rank_is_gone_is_reported(port):
    topology = place_clients(HOSTS, 2, "auto")

    def work(rank):
        store = meet(launch_of(rank, port), LIMIT_S)
        return (
            torch_world_env(
                store, topology.cluster_of(topology.placement(rank).cluster).ranks, launch_of(rank, port), 1
            )
            if rank == 1
            else store
        )

    result = in_threads(work)[1]
    assert isinstance(result, LostPeerError)
    assert "rank 0 (host alpha, slot 0) did not open the torch world of ranks 0, 1" in str(result)


def test_the_store_knows_the_ranks_seen_and_rank_0_leaves_last(port):
    def work(rank):
        store = meet(launch_of(rank, port), LIMIT_S)
        if rank != 1:
            publish(store, f"round/3/{rank}", "here")
        if rank == 2:
            return leave(store, 5)
        missing = store.wait([f"round/3/{other}" for other in range(3)], 0.3)
        return missing, published(store, "round/3", range(3)), leave(store, 0.5) if rank == 0 else None

    first, second, third = in_threads(work)
    assert first == ({"round/3/1"}, {0, 2}, {1}), "rank 1 neither arrived nor said goodbye"
    assert second[:2] == ({"round/3/1"}, {0, 2})
    assert third == set()


def test_one_rank_is_the_first(port):
    stores = in_threads(lambda rank: meet(launch_of(rank, port), 20))
    assert sorted(store.is_first("a") for store in stores) == [False, False, True]
    assert stores[2].is_first("b") and not stores[0].is_first("b")


class DeadStore:
    """A TCPStore whose server has crashed, or (silent) whose machine has vanished."""

    def __init__(self, silent):
        self.silent = silent
        self.asked = 0

    def check(self, keys):
        self.asked += 1
        if self.silent:
            threading.Event().wait(LIMIT_S)
        raise RuntimeError("Connection reset by peer")

    def set(self, key, text):
        self.check([key])

    def add(self, key, amount):
        self.check([key])


@pytest.mark.parametrize("silent", [False, True])
def test_a_dead_store_makes_no_second_failure(monkeypatch, silent):
    monkeypatch.setattr("fedspeed.cluster.rendezvous._QUERY_S", 0.2)
    dead = DeadStore(silent)
    store = Store(dead, ("127.0.0.1", 1), 1)
    store.peers = (Peer(0, "a", 1), Peer(1, "a", 2))
    started = time.monotonic()
    publish(store, "round/1/1", "here")
    assert published(store, "round/1", range(20)) == set()
    assert not store.is_first("a")
    assert leave(store, 5) == set()
    assert store.wait(["a", "b"], 0.5) == {"a", "b"}
    assert time.monotonic() - started < LIMIT_S / 10
    assert dead.asked == 1, "a silent store is asked once, not once per rank"
