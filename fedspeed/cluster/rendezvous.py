"""How the ranks of a job find each other, check that they agree, and form one torch world per cluster.

World rank 0 holds a key-value store (torch's TCPStore, separate from the stores of the torch worlds). The
module imports torch only inside the functions that use it.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedspeed.cluster.discover import Launch
from fedspeed.cluster.hostnames import find_host
from fedspeed.cluster.launch_context import host_of_rank
from fedspeed.cluster.store_connection import open_or_connect, open_server, ranks_text
from fedspeed.errors import HostfileError, LostPeerError
from fedspeed.net.ports import RESOLVER_OPTIONS, RESOLVER_VARIABLE, reachable_address

if TYPE_CHECKING:
    from torch.distributed import PrefixStore, TCPStore

T = TypeVar("T")

_MAX_PAUSE_S = 0.25
# Time for the others to read the announcements that rank 0 has read already.
_READ_S = 10.0
# Timeout of a query to the store where the caller can go on without an answer. The store may itself have
# failed.
_QUERY_S = 3.0
# Timeout of a query where the caller cannot.
_REQUIRED_QUERY_S = 30.0


@dataclass(frozen=True)
class Peer:
    """The machine and process of a world rank that has joined.

    `boot` is the boot id of its kernel. It distinguishes machines of equal names, such as gpu1 of two
    organisations.
    """

    world_rank: int
    hostname: str
    pid: int
    boot: str = ""

    @property
    def machine(self) -> tuple[str, str]:
        """Equal for ranks of one machine, or of one host that a machine emulates."""
        return self.hostname, self.boot


class Store:
    """A rank's connection to the job's key-value store, and the ranks that have joined.

    Rank 0 holds the server: the store ends with that process.

    Attributes:
        address: (host, port) at which the store was reached.
        peers: all ranks, by world rank.
        world_server: the store of this rank's torch world, on the first rank of that world.
    """

    def __init__(self, tcp: "TCPStore", address: tuple[str, int], world_rank: int):
        self.address = address
        self.world_rank = world_rank
        self.peers: tuple[Peer, ...] = ()
        self.world_server: TCPStore | None = None
        self._tcp = tcp
        self._gone = False
        self._lock = threading.Lock()
        self._unanswered: threading.Thread | None = None

    def put(self, key: str, text: str) -> None:
        """Set a key.

        Raises:
            LostPeerError: the store is gone or does not answer; so for `add` and `get`.
        """
        self._require(lambda: self._set(key, text))

    def add(self, key: str, amount: int) -> int:
        """Add to a counter that starts at 0; return its new value."""
        return self._require(lambda: self._tcp.add(key, amount))

    def get(self, *keys: str) -> list[str]:
        """Return the values of keys that exist."""
        return [value.decode() for value in self._require(lambda: self._tcp.multi_get(list(keys)))]

    def try_put(self, key: str, text: str) -> None:
        """Set a key as `put` does; give up after a few seconds instead of raising."""
        self._query(lambda: self._set(key, text), _QUERY_S)

    def is_first(self, key: str) -> bool:
        """Return whether this rank is the first to ask about `key`.

        If the store does not answer, rank 0, which holds it, counts as the first.
        """
        count = self._query(lambda: self._tcp.add(key, 1), _QUERY_S)
        return self.world_rank == 0 if count is None else count == 1

    def wait(self, keys: list[str], timeout_s: float) -> set[str]:
        """Wait until all keys exist; return those that do not at the timeout, or all if the store is gone.

        The store is polled: the TCPStore's own wait prints a warning at each timeout.
        """
        deadline = time.monotonic() + timeout_s
        pause_s = 0.005
        while True:
            left_s = deadline - time.monotonic()
            if self._query(lambda: self._tcp.check(keys), max(left_s, _QUERY_S)):
                return set()
            if self._gone or left_s <= 0:
                return {key for key in keys if not self.has(key)}
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    def has(self, key: str) -> bool:
        """Return whether a key exists; False too if the store does not answer within a few seconds."""
        return bool(self._query(lambda: self._tcp.check([key]), _QUERY_S))

    def connect(self, prefix: str, timeout_s: float) -> "PrefixStore":
        """Return a torch store on a new connection, for a process group; its keys begin with `prefix`."""
        from torch.distributed import PrefixStore, TCPStore

        host, port = self.address
        timeout = timedelta(seconds=timeout_s)
        return PrefixStore(
            prefix, TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
        )

    def _set(self, key: str, text: str) -> bool:
        """Set a key; return True, since None stands for a query without an answer."""
        self._tcp.set(key, text)
        return True

    def _require(self, query: Callable[[], T]) -> T:
        answer = self._query(query, _REQUIRED_QUERY_S)
        if answer is None:
            raise LostPeerError(
                f"rank 0, which holds the meeting store at {self.address[0]}:{self.address[1]}, is gone or "
                "does not answer; look at its output"
            )
        return answer

    def _query(self, query: Callable[[], T], timeout_s: float) -> T | None:
        """Return the answer of the store, or None if it is gone or does not answer.

        The query runs in a thread because a TCPStore waits without limit for a server whose machine has
        vanished. While one query is unanswered, further ones return at once.
        """
        answers: list[T] = []

        def run() -> None:
            try:
                answers.append(query())
            except RuntimeError:
                self._gone = True

        with self._lock:
            if self._gone or (self._unanswered and self._unanswered.is_alive()):
                return None
            thread = threading.Thread(target=run, name="fedspeed-store", daemon=True)
            thread.start()
            thread.join(timeout_s)
            if thread.is_alive():
                self._unanswered = thread
            return answers[0] if answers else None


def meet(launch: Launch, timeout_s: float) -> Store:
    """Bring all ranks of the job together; return when each of them has joined.

    Args:
        launch: of a rank, not of kind `none`.
        timeout_s: for all of it.

    Raises:
        LostPeerError: ranks are missing at the timeout (the message names them), or the port is taken.
        HostfileError: the ranks have found different hosts, or run on other machines than the hostfile says.
    """
    os.environ.setdefault(RESOLVER_VARIABLE, RESOLVER_OPTIONS)
    deadline = time.monotonic() + timeout_s
    tcp, address = open_or_connect(launch, timeout_s)
    store = Store(tcp, address, launch.world_rank)
    announcement = {
        "hostname": socket.gethostname(),
        "boot": _boot_id(),
        "pid": os.getpid(),
        "layout": _layout_text(launch),
    }
    store.put(_joined_key(launch.world_rank), json.dumps(announcement))
    all_ranks = range(launch.world_size)
    missing = store.wait([_joined_key(rank) for rank in all_ranks], deadline - time.monotonic())
    if missing:
        ranks = [rank for rank in all_ranks if _joined_key(rank) in missing]
        raise LostPeerError(
            f"{len(ranks)} of {launch.world_size} ranks did not arrive at "
            f"{launch.master_addr}:{store.address[1]} within {timeout_s:g} s: {ranks_text(launch, ranks)}; "
            "look at their output, or raise cluster.start_timeout_s"
        )
    announcements = [json.loads(text) for text in store.get(*map(_joined_key, all_ranks))]
    store.put(_read_key(launch.world_rank), "read")
    if launch.world_rank == 0:
        # If the announcements are refused below, all ranks end at once. Rank 0, which holds the store, must
        # not end before the others have read them.
        store.wait([_read_key(rank) for rank in all_ranks], _READ_S)
    store.peers = tuple(
        Peer(rank, str(values["hostname"]), int(values["pid"]), str(values["boot"]))
        for rank, values in enumerate(announcements)
    )
    _check_layouts(announcements)
    _check_machines(launch, store.peers)
    return store


def torch_world_env(store: Store, ranks: Sequence[int], launch: Launch, timeout_s: float) -> dict[str, str]:
    """Return the environment of this rank's torch world, to be set before torch.distributed is initialised.

    RANK and WORLD_SIZE count in that world. LOCAL_RANK and LOCAL_SIZE remain the machine's, as the launcher
    numbered its ranks: they choose the accelerator and divide the cores, and DeepSpeed requires that
    LOCAL_RANK equals Open MPI's. CROSS_RANK and CROSS_SIZE count the machines of the world. MASTER_ADDR and
    MASTER_PORT are those of a store that the first rank has already opened and keeps open: where torch opens
    a store on the same port, it shares the server. The world lives as long as `store`.

    Args:
        ranks: the world ranks of that world in order, this one among them.

    Raises:
        LostPeerError: the first of them did not open its store before the timeout.
    """
    world_rank = store.world_rank
    machine = store.peers[world_rank].machine
    key = f"fedspeed/world/{ranks[0]}"
    if world_rank == ranks[0]:
        address = reachable_address(launch.master_addr, machine == store.peers[0].machine)
        store.world_server = open_server(0, timeout_s)
        store.put(key, json.dumps([address, store.world_server.port]))
    elif store.wait([key], timeout_s):
        raise LostPeerError(
            f"{ranks_text(launch, [ranks[0]])} did not open the torch world of ranks "
            f"{', '.join(map(str, ranks))} within {timeout_s:g} s; look at its output"
        )
    master_addr, master_port = json.loads(store.get(key)[0])
    machines = list(dict.fromkeys(store.peers[rank].machine for rank in ranks))
    return {
        "RANK": str(ranks.index(world_rank)),
        "WORLD_SIZE": str(len(ranks)),
        "LOCAL_RANK": str(launch.local_rank),
        "LOCAL_SIZE": str(sum(peer.machine == machine for peer in store.peers)),
        "CROSS_RANK": str(machines.index(machine)),
        "CROSS_SIZE": str(len(machines)),
        "MASTER_ADDR": str(master_addr),
        "MASTER_PORT": str(master_port),
    }


def publish(store: Store, key: str, text: str) -> None:
    """Publish a value to the other ranks, for instance `round/7/3` for "rank 3 has reached round 7".

    Nothing is raised if the store is gone: published values explain a failure and must not be one.
    """
    store.try_put(key, text)


def published(store: Store, prefix: str, ranks: Iterable[int]) -> set[int]:
    """Return those of `ranks` that have published `prefix/RANK`.

    If the store does not answer, those count that are known after a few seconds.
    """
    return {rank for rank in ranks if store.has(f"{prefix}/{rank}")}


def leave(store: Store, timeout_s: float) -> set[int]:
    """Publish that this rank leaves. World rank 0, which holds the store, then waits for all others to leave.

    Returns:
        the world ranks that rank 0 was still waiting for at the timeout; empty on the others.
    """
    publish(store, _left_key(store.world_rank), "bye")
    if store.world_rank != 0:
        return set()
    return ranks_not_left(store, [peer.world_rank for peer in store.peers], timeout_s)


def ranks_not_left(store: Store, ranks: Iterable[int], timeout_s: float) -> set[int]:
    """Wait until all of `ranks` have left; return those that have not at the timeout."""
    ranks = list(ranks)
    missing = store.wait([_left_key(rank) for rank in ranks], timeout_s)
    return {rank for rank in ranks if _left_key(rank) in missing}


def _joined_key(world_rank: int) -> str:
    return f"fedspeed/here/{world_rank}"


def _read_key(world_rank: int) -> str:
    return f"fedspeed/read/{world_rank}"


def _left_key(world_rank: int) -> str:
    return f"fedspeed/bye/{world_rank}"


def _layout_text(launch: Launch) -> str:
    """Return what must be equal on all ranks: hosts and slots in order, with all facts."""
    return json.dumps([(host.name, host.slots, *host.facts) for host in launch.hosts])


def _check_layouts(announcements: list[dict[str, Any]]) -> None:
    first = announcements[0]
    for rank, announcement in enumerate(announcements):
        if announcement["layout"] != first["layout"]:
            raise HostfileError(
                f"rank 0 on {first['hostname']} and rank {rank} on {announcement['hostname']} found "
                f"different hosts: {first['layout']} and {announcement['layout']}; name the same file on "
                "all with `launch.py --hostfile FILE`"
            )


def _check_machines(launch: Launch, peers: tuple[Peer, ...]) -> None:
    """Check that ranks of one host run on one machine, and on that host where its name is known.

    One machine may emulate several hosts; then names decide nothing.
    """
    machines: dict[str, Peer] = {}
    emulated = len({peer.machine for peer in peers}) == 1
    for peer in peers:
        host, _ = host_of_rank(launch.hosts, peer.world_rank)
        first = machines.setdefault(host.name, peer)
        if first.machine != peer.machine:
            where = f"{first.hostname} and {peer.hostname}"
            if first.hostname == peer.hostname:
                where = f"two machines that are both called {peer.hostname}"
            raise HostfileError(
                f"ranks {first.world_rank} and {peer.world_rank} belong to host {host.name}, but run on "
                f"{where}; let ranks be numbered host by host (mpirun --map-by slot, srun "
                "--distribution=block), or correct the hostfile"
            )
        actual = find_host(launch.hosts, peer.hostname)
        if actual and not emulated and host != actual:
            raise HostfileError(
                f"rank {peer.world_rank} belongs to host {host.name}, but runs on {peer.hostname}; write "
                "the hosts in the order in which the launcher numbers them"
            )


def _boot_id() -> str:
    """Return the boot id of this machine's kernel; empty where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""
