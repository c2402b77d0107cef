"""How the ranks of a job find each other and check that they agree.

World rank 0 holds a key-value store (torch's TCPStore, separate from the stores of the torch worlds). A job
of one rank has a store in its memory, without a socket. The module imports torch only inside the functions
that use it.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, Union

from fedspeed.cluster.discover import Launch
from fedspeed.cluster.hostnames import find_host
from fedspeed.cluster.launch_context import host_of_rank
from fedspeed.cluster.store_connection import open_or_connect, ranks_text
from fedspeed.cluster.store_values import parse_values
from fedspeed.errors import HostfileError, LostPeerError
from fedspeed.net.interfaces import GLOO_INTERFACE, LOOPBACK, address_facing, interface_of, is_loopback
from fedspeed.net.ports import RESOLVER_OPTIONS, RESOLVER_VARIABLE

if TYPE_CHECKING:
    from torch.distributed import HashStore, PrefixStore, TCPStore

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


@dataclass(frozen=True)
class _Announcement:
    """What a rank publishes when it joins; see `Peer`. `layout` is the text of `_layout_text`."""

    hostname: str
    pid: int
    boot: str
    layout: str


class Store:
    """A rank's connection to the job's key-value store, and the ranks that have joined.

    Rank 0 holds the server: the store ends with that process.

    Args:
        backend: torch's store; a HashStore in a job of one rank.

    Attributes:
        address: (host, port) at which the store was reached. Ranks on the machine of rank 0 have the address
            that it listens on. ("", 0) in a job of one rank.
        peers: all ranks, by world rank.
        world_server: the store of this rank's torch world, on the first rank of that world.
    """

    def __init__(self, backend: Union["TCPStore", "HashStore"], address: tuple[str, int], world_rank: int):
        self.address = address
        self.world_rank = world_rank
        self.peers: tuple[Peer, ...] = ()
        self.world_server: TCPStore | None = None
        self._backend = backend
        self._user_interfaces = os.environ.get(GLOO_INTERFACE)
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
        return self._require(lambda: self._backend.add(key, amount))

    def get(self, *keys: str) -> list[str]:
        """Return the values of keys that exist."""
        return [
            value.decode(errors="replace")
            for value in self._require(lambda: self._backend.multi_get(list(keys)))
        ]

    def try_put(self, key: str, text: str) -> None:
        """Set a key as `put` does; give up after a few seconds instead of raising."""
        self._query(lambda: self._set(key, text), _QUERY_S)

    def is_first(self, key: str) -> bool:
        """Return whether this rank is the first to ask about `key`.

        If the store does not answer, rank 0, which holds it, counts as the first.
        """
        count = self._query(lambda: self._backend.add(key, 1), _QUERY_S)
        return self.world_rank == 0 if count is None else count == 1

    def wait(self, keys: list[str], timeout_s: float) -> set[str]:
        """Wait until all keys exist; return those that do not at the timeout, or all if the store is gone.

        The store is polled: the TCPStore's own wait prints a warning at each timeout.
        """
        deadline = time.monotonic() + timeout_s
        pause_s = 0.005
        while True:
            left_s = deadline - time.monotonic()
            if self._query(lambda: self._backend.check(keys), max(left_s, _QUERY_S)):
                return set()
            if self._gone or left_s <= 0:
                return {key for key in keys if not self.has(key)}
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    def has(self, key: str) -> bool:
        """Return whether a key exists; False too if the store does not answer within a few seconds."""
        return bool(self._query(lambda: self._backend.check([key]), _QUERY_S))

    def connect(self, prefix: str, timeout_s: float) -> "PrefixStore":
        """Return a torch store on a new connection, for a process group; its keys begin with `prefix`."""
        from torch.distributed import HashStore, PrefixStore, TCPStore

        if isinstance(self._backend, HashStore):
            return PrefixStore(prefix, self._backend)
        host, port = self.address
        timeout = timedelta(seconds=timeout_s)
        return PrefixStore(
            prefix, TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
        )

    def listen_address(self, ranks: Iterable[int]) -> str:
        """Return the address of this machine to listen on for `ranks`: loopback if all of them run here.

        Otherwise it is that of the interface which faces the machine of rank 0; on that machine the address
        that rank 0 listens on.
        """
        machine = self.peers[self.world_rank].machine
        if all(self.peers[rank].machine == machine for rank in ranks):
            return LOOPBACK
        if machine == self.peers[0].machine:
            return self.address[0]
        return address_facing(self.address[0])

    def interfaces(self, ranks: Iterable[int]) -> str:
        """Return the names of the interfaces through which gloo shall connect this rank with `ranks`.

        GLOO_SOCKET_IFNAME as the user has set it applies where they run on several machines.

        Raises:
            HostfileError: no interface of this machine has the address of `listen_address`.
        """
        address = self.listen_address(ranks)
        if not is_loopback(address) and self._user_interfaces:
            return self._user_interfaces
        try:
            return interface_of(address)
        except OSError as error:
            raise HostfileError(
                f"{error}; set MASTER_ADDR to an address of the first host, or {GLOO_INTERFACE} to the name "
                "of an interface"
            ) from error

    def _set(self, key: str, text: str) -> bool:
        """Set a key; return True, since None stands for a query without an answer."""
        self._backend.set(key, text)
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
    store = _store_of(launch, timeout_s)
    announcement = _Announcement(socket.gethostname(), os.getpid(), _boot_id(), _layout_text(launch))
    store.put(_joined_key(launch.world_rank), json.dumps(asdict(announcement)))
    all_ranks = range(launch.world_size)
    missing = store.wait([_joined_key(rank) for rank in all_ranks], deadline - time.monotonic())
    if missing:
        ranks = [rank for rank in all_ranks if _joined_key(rank) in missing]
        raise LostPeerError(
            f"{len(ranks)} of {launch.world_size} ranks did not arrive at "
            f"{launch.master_addr}:{store.address[1]} within {timeout_s:g} s: {ranks_text(launch, ranks)}; "
            f"look at their output, or raise cluster.start_timeout_s{_loopback_note(launch, store)}"
        )
    keys = [_joined_key(rank) for rank in all_ranks]
    texts = store.get(*keys)
    store.put(_read_key(launch.world_rank), "read")
    if launch.world_rank == 0:
        # If the announcements are refused below, all ranks end at once. Rank 0, which holds the store, must
        # not end before the others have read them.
        store.wait([_read_key(rank) for rank in all_ranks], _READ_S)
    announcements = parse_values(keys, texts, _announcement)
    store.peers = tuple(
        Peer(rank, item.hostname, item.pid, item.boot) for rank, item in enumerate(announcements)
    )
    _check_layouts(announcements)
    _check_machines(launch, store.peers)
    return store


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


def _store_of(launch: Launch, timeout_s: float) -> Store:
    """Open the job's store, or connect to it. Raises as `open_or_connect` does."""
    if launch.world_size == 1:
        from torch.distributed import HashStore

        return Store(HashStore(), ("", 0), launch.world_rank)
    return Store(*open_or_connect(launch, timeout_s), launch.world_rank)


def _announcement(text: str) -> _Announcement:
    """Return a parsed announcement. Raises as `read_values` lets a parser do."""
    values = json.loads(text)
    hostname, boot, layout = (str(values[key]) for key in ("hostname", "boot", "layout"))
    return _Announcement(hostname, int(values["pid"]), boot, layout)


def _loopback_note(launch: Launch, store: Store) -> str:
    """Return what to do if rank 0 of a job of several hosts listens on loopback only; else nothing."""
    if launch.one_machine or launch.world_rank or not is_loopback(store.address[0]):
        return ""
    return (
        f". Rank 0 listens on {store.address[0]} only, since `{launch.master_addr}` has no other address "
        "here: if the ranks run on several machines, set MASTER_ADDR to this machine's address in their "
        "network"
    )


def _joined_key(world_rank: int) -> str:
    return f"fedspeed/here/{world_rank}"


def _read_key(world_rank: int) -> str:
    return f"fedspeed/read/{world_rank}"


def _left_key(world_rank: int) -> str:
    return f"fedspeed/bye/{world_rank}"


def _layout_text(launch: Launch) -> str:
    """Return what must be equal on all ranks: hosts and slots in order, with all facts."""
    return json.dumps([(host.name, host.slots, *host.facts) for host in launch.hosts])


def _check_layouts(announcements: Sequence[_Announcement]) -> None:
    first = announcements[0]
    for rank, announcement in enumerate(announcements):
        if announcement.layout != first.layout:
            raise HostfileError(
                f"rank 0 on {first.hostname} and rank {rank} on {announcement.hostname} found different "
                f"hosts: {first.layout} and {announcement.layout}; name the same file on all with "
                "`launch.py --hostfile FILE`"
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
