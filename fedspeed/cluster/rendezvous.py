"""How the ranks of a job find each other, agree on who they are, and give each cluster a torch world of its
own.

World rank 0 holds a key-value store (torch's TCPStore, beside and apart from the stores of the torch worlds).
The module imports torch only inside the functions that talk to it.
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
from typing import Any

from fedspeed.cluster.discover import Launch
from fedspeed.cluster.hostnames import find_host
from fedspeed.cluster.layout import host_of_rank
from fedspeed.cluster.meeting import named, open_or_connect, open_server
from fedspeed.errors import HostfileError, LostPeerError
from fedspeed.net.ports import RESOLVER_OPTIONS, RESOLVER_VARIABLE, reachable_address

_LONGEST_PAUSE_S = 0.25
# Time for the others to read what rank 0 has read already.
_READ_S = 10.0
# One question to the store, which may itself be what has failed.
_ASK_S = 3.0
# The same where there is no going on without an answer.
_MUST_S = 30.0


@dataclass(frozen=True)
class Peer:
    """A rank that has arrived: the machine and process behind a world rank.

    `boot` is the id of its kernel's start. It tells machines apart that call themselves alike, as gpu1 of two
    organisations may.
    """

    world_rank: int
    hostname: str
    pid: int
    boot: str = ""

    @property
    def machine(self) -> tuple[str, str]:
        """Equal for ranks of one machine, or of one of the hosts that a machine emulates."""
        return self.hostname, self.boot


class Store:
    """The job's key-value store as one rank sees it, with everybody's announcement.

    Rank 0's object holds the server: the store ends with that process. `peers[world_rank]` is complete.
    `opened_world` is the store of a torch world, on its first rank.
    """

    def __init__(self, tcp: Any, address: tuple[str, int], world_rank: int):
        self.address = address
        self.world_rank = world_rank
        self.peers: tuple[Peer, ...] = ()
        self.opened_world: Any = None
        self._tcp = tcp
        self._gone = False
        self._lock = threading.Lock()
        self._unanswered: threading.Thread | None = None

    def put(self, key: str, text: str) -> None:
        """Raises LostPeerError if the store is gone or silent, as `add` and `get` do."""
        self._must(lambda: self._tcp.set(key, text) or True)

    def add(self, key: str, amount: int) -> int:
        """Adds to a counter that starts at 0; returns its new value."""
        return self._must(lambda: self._tcp.add(key, amount))

    def get(self, *keys: str) -> list[str]:
        """The texts of keys that are there."""
        return [value.decode() for value in self._must(lambda: self._tcp.multi_get(list(keys)))]

    def note(self, key: str, text: str) -> None:
        """Like `put`, but silent, and given up after a few seconds."""
        self._ask(lambda: self._tcp.set(key, text) or True, _ASK_S)

    def is_first(self, key: str) -> bool:
        """Whether this rank is the first to ask about `key`. Of a store that does not answer, rank 0, which
        holds it, is.
        """
        count = self._ask(lambda: self._tcp.add(key, 1), _ASK_S)
        return self.world_rank == 0 if count is None else count == 1

    def wait(self, keys: list[str], timeout_s: float) -> set[str]:
        """Waits until all keys are there. Returns those that are not at the deadline, and all of them if the
        store is gone.

        Asks again and again instead of using the TCPStore's own wait, which prints a warning whenever it runs
        out.
        """
        deadline = time.monotonic() + timeout_s
        pause_s = 0.005
        while True:
            left_s = deadline - time.monotonic()
            if self._ask(lambda: self._tcp.check(keys), max(left_s, _ASK_S)):
                return set()
            if self._gone or left_s <= 0:
                return {key for key in keys if not self.has(key)}
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def has(self, key: str) -> bool:
        """Whether a key is there; False too if the store does not answer within a few seconds."""
        return bool(self._ask(lambda: self._tcp.check([key]), _ASK_S))

    def connect(self, prefix: str, timeout_s: float) -> Any:
        """A torch store on a connection of its own, for a process group; its keys live under `prefix`."""
        from torch.distributed import PrefixStore, TCPStore

        tcp = TCPStore(
            *self.address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )
        return PrefixStore(prefix, tcp)

    def _must(self, question: Callable[[], Any]) -> Any:
        answer = self._ask(question, _MUST_S)
        if answer is None:
            raise LostPeerError(
                f"rank 0, which holds the meeting store at {self.address[0]}:{self.address[1]}, is gone or "
                "does not "
                "answer; look at its output"
            )
        return answer

    def _ask(self, question: Callable[[], Any], limit_s: float) -> Any:
        """The answer, or None if the store is gone or silent.

        Asked from a thread because a TCPStore waits without limit for a server whose machine has vanished.
        While one question stays unanswered, nobody waits for another.
        """
        answers: list[Any] = []

        def ask() -> None:
            try:
                answers.append(question())
            except RuntimeError:
                self._gone = True

        with self._lock:
            if self._gone or (self._unanswered and self._unanswered.is_alive()):
                return None
            thread = threading.Thread(target=ask, name="fedspeed-store", daemon=True)
            thread.start()
            thread.join(limit_s)
            if thread.is_alive():
                self._unanswered = thread
            return answers[0] if answers else None


def meet(launch: Launch, timeout_s: float) -> Store:
    """Brings all ranks of the job together; returns when every one has announced itself.

    Args:
        launch: of a rank, that is not of kind `none`.
        timeout_s: deadline for all of it.

    Raises:
        LostPeerError: ranks are missing at the deadline (named), or the meeting port is taken.
        HostfileError: the ranks found different hosts, or run elsewhere than the hostfile says.
    """
    os.environ.setdefault(RESOLVER_VARIABLE, RESOLVER_OPTIONS)
    deadline = time.monotonic() + timeout_s
    tcp, address = open_or_connect(launch, timeout_s)
    store = Store(tcp, address, launch.world_rank)
    mine = {
        "hostname": socket.gethostname(),
        "boot": _boot_id(),
        "pid": os.getpid(),
        "layout": _layout_text(launch),
    }
    store.put(_here(launch.world_rank), json.dumps(mine))
    missing = store.wait([_here(rank) for rank in range(launch.world_size)], deadline - time.monotonic())
    if missing:
        ranks = [rank for rank in range(launch.world_size) if _here(rank) in missing]
        raise LostPeerError(
            f"{len(ranks)} of {launch.world_size} ranks did not arrive at "
            f"{launch.master_addr}:{store.address[1]} within "
            f"{timeout_s:g} s: {named(launch, ranks)}; look at their output, or raise cluster.start_timeout_s"
        )
    said = [json.loads(text) for text in store.get(*map(_here, range(launch.world_size)))]
    store.put(_read(launch.world_rank), "read")
    if launch.world_rank == 0:
        # If what was said is wrong, all ranks end at once; rank 0, and the store with it, after the others
        # have seen why.
        store.wait([_read(rank) for rank in range(launch.world_size)], _READ_S)
    store.peers = tuple(
        Peer(rank, str(words["hostname"]), int(words["pid"]), str(words["boot"]))
        for rank, words in enumerate(said)
    )
    _check_layouts(said)
    _check_machines(launch, store.peers)
    return store


def torch_world_env(store: Store, ranks: Sequence[int], launch: Launch, timeout_s: float) -> dict[str, str]:
    """The environment of this rank's torch world; to be set before anything initialises torch.distributed.

    RANK and WORLD_SIZE count in that world. LOCAL_RANK and LOCAL_SIZE stay the machine's, as the launcher
    numbered it: they choose the accelerator and divide the cores, and DeepSpeed insists that LOCAL_RANK
    equals Open MPI's. CROSS_RANK and CROSS_SIZE count its machines. MASTER_ADDR and MASTER_PORT are those of
    a store that its first rank has opened already and keeps open: torch, asked to open one there, shares it.
    The world lives as long as `store`.

    Args:
        ranks: the world ranks of it, in order; this one among them.

    Raises:
        LostPeerError: the first of them published nothing before the deadline.
    """
    world_rank = store.world_rank
    machine = store.peers[world_rank].machine
    key = f"fedspeed/world/{ranks[0]}"
    if world_rank == ranks[0]:
        address = reachable_address(launch.master_addr, machine == store.peers[0].machine)
        store.opened_world = open_server(0, timeout_s)
        store.put(key, json.dumps([address, store.opened_world.port]))
    elif store.wait([key], timeout_s):
        raise LostPeerError(
            f"{named(launch, [ranks[0]])} did not open the torch world of ranks "
            f"{', '.join(map(str, ranks))} within {timeout_s:g} s; look at "
            "its output"
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
    """Leaves a note for the others, for instance `round/7/3` for "rank 3 has reached round 7". Silent if the
    store is gone: a note is there to explain a failure, and must not be one.
    """
    store.note(key, text)


def published(store: Store, prefix: str, ranks: Iterable[int]) -> set[int]:
    """Those of `ranks` that have published `prefix/RANK`; what is known within a few seconds if the store
    does not answer.
    """
    return {rank for rank in ranks if store.has(f"{prefix}/{rank}")}


def leave(store: Store, timeout_s: float) -> set[int]:
    """Says goodbye. World rank 0, which holds the store, waits for the others' first, so that nobody loses it
    too early.

    Returns the world ranks that rank 0 did not hear from before the deadline; empty on the others.
    """
    publish(store, _bye(store.world_rank), "bye")
    if store.world_rank != 0:
        return set()
    return ranks_not_left(store, [peer.world_rank for peer in store.peers], timeout_s)


def ranks_not_left(store: Store, ranks: Iterable[int], timeout_s: float) -> set[int]:
    """Waits until all of `ranks` have said goodbye; returns those that have not at the deadline."""
    ranks = list(ranks)
    missing = store.wait([_bye(rank) for rank in ranks], timeout_s)
    return {rank for rank in ranks if _bye(rank) in missing}


def _here(world_rank: int) -> str:
    return f"fedspeed/here/{world_rank}"


def _read(world_rank: int) -> str:
    return f"fedspeed/read/{world_rank}"


def _bye(world_rank: int) -> str:
    return f"fedspeed/bye/{world_rank}"


def _layout_text(launch: Launch) -> str:
    """What must be equal on all ranks: hosts and slots in order, with every fact."""
    return json.dumps([(host.name, host.slots, *host.facts) for host in launch.hosts])


def _check_layouts(said: list[dict[str, Any]]) -> None:
    for rank, words in enumerate(said):
        if words["layout"] != said[0]["layout"]:
            raise HostfileError(
                f"rank 0 on {said[0]['hostname']} and rank {rank} on {words['hostname']} found different "
                "hosts: "
                f"{said[0]['layout']} and {words['layout']}; name the same file on all with `launch.py "
                "--hostfile FILE`"
            )


def _check_machines(launch: Launch, peers: tuple[Peer, ...]) -> None:
    """Ranks that are planned on one host must run on one machine, and on that machine if the hostfile knows
    its name.

    One machine may stand for several hosts (an emulated cluster); then names say nothing.
    """
    machines: dict[str, Peer] = {}
    emulated = len({peer.machine for peer in peers}) == 1
    for peer in peers:
        host, _ = host_of_rank(launch.hosts, peer.world_rank)
        first = machines.setdefault(host.name, peer)
        if first.machine != peer.machine:
            alike = first.hostname == peer.hostname
            where = (
                f"two machines that are both called {peer.hostname}"
                if alike
                else f"{first.hostname} and {peer.hostname}"
            )
            raise HostfileError(
                f"ranks {first.world_rank} and {peer.world_rank} belong to host {host.name}, but run on "
                f"{where}; let ranks "
                "be numbered host by host (mpirun --map-by slot, srun --distribution=block), or correct the "
                "hostfile"
            )
        known = find_host(launch.hosts, peer.hostname)
        if known and not emulated and host != known:
            raise HostfileError(
                f"rank {peer.world_rank} belongs to host {host.name}, but runs on {peer.hostname}; write "
                "the hosts in the "
                "order in which the launcher numbers them"
            )


def _boot_id() -> str:
    """Of this machine's kernel, empty where the kernel does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""
