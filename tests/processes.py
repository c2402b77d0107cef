"""Run a function on several ranks, as real processes, with a deadline.

The processes are forked from one server that has imported the heavy libraries once: a test with four ranks
costs one import.
"""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta

from fedspeed.net import ports
from tests.limits import LIMIT_S

_held: list[socket.socket] = []
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.preloaded"])


def free_port(count: int = 1) -> int:
    """The first of `count` ports in a row that belong to this process until it ends: no other test's,
    whichever worker runs it.

    A socket that does not listen holds each of them. Beside it a server may listen, as servers do that set
    SO_REUSEADDR; who asks whether the port is free is told that it is not.
    """
    while True:
        first = ports.free_port()
        try:
            _held.extend([_hold(first + i) for i in range(count)])
        except OSError:
            continue
        return first


def free_ports(count: int) -> list[int]:
    """Different ones."""
    return [free_port() for _ in range(count)]


def _hold(port: int) -> socket.socket:
    with socket.socket() as probe:
        probe.bind(("", port))
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("", port))
    return holder


def all_is_preloaded() -> None:
    """The server passes over an import that fails, and every process would do them all by itself, unseen."""
    assert "tests.preloaded" in sys.modules, "`python -m tests.preloaded` says what could not be imported"


def _rank(pipe, function, rank, *, args, named):
    try:
        all_is_preloaded()
        pipe.send((True, function(rank, *args, **named)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()


def _with_env(rank, env, function, *args, **named):
    os.environ.update(env[rank])
    return function(rank, *args, **named)


def run_ranks(
    world: int, function, *args, timeout: float = LIMIT_S, mortal: frozenset[int] = frozenset(), **named
) -> list:
    """`[function(rank, *args, **named) for rank in range(world)]`, each in a process of its own; raises if
    any fails or is late. None for a mortal one that has died without a word.
    """
    pipes = []
    processes = []
    try:
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank,
                args=(theirs, function, rank),
                kwargs={"args": args, "named": named},
                daemon=True,
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        end = time.monotonic() + timeout
        results = {}
        failures = []
        while len(results) < world and not failures:
            waiting = [p for r, p in enumerate(pipes) if r not in results]
            ready = multiprocessing.connection.wait(waiting, timeout=max(0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(
                    f"ranks {[r for r in range(world) if r not in results]} of {world} gave no answer in "
                    f"{timeout} s"
                )
            for pipe in ready:
                rank = pipes.index(pipe)
                try:
                    good, value = pipe.recv()
                except EOFError:
                    good, value = (True, None) if rank in mortal else (False, "died without a word")
                results[rank] = value
                if not good:
                    failures.append(f"rank {rank}:\n{value}")
        if failures:
            raise AssertionError("\n".join(failures))
        return [results[rank] for rank in range(world)]
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


@dataclass(frozen=True)
class Failed:
    """A scenario that did not come to its end, and why."""

    trace: str


class Scenarios(dict):
    """What scenarios gave, by name. One that failed raises where it is looked at: it fails the tests that
    need it, and no others.
    """

    def play(self, name, scenario, *args, **options) -> None:
        """Keep what `scenario(*args, **options)` returns or how it failed."""
        try:
            self[name] = scenario(*args, **options)
        except Exception:
            self[name] = Failed(traceback.format_exc())

    def play_together(self, world, name, scenario, *args, **options) -> None:
        """The same on all ranks of the worlds (federation/runs.World), which go on together: who failed early
        does not begin the next scenario alone.
        """
        self.play(name, scenario, world, *args, **options)
        world.store.set(f"played/{name}/{world.rank}", "1")
        world.store.wait(
            [f"played/{name}/{rank}" for rank in range(sum(world.clusters))], timedelta(seconds=LIMIT_S)
        )

    def __getitem__(self, name):
        found = super().__getitem__(name)
        if isinstance(found, Failed):
            raise AssertionError(f"scenario {name!r} failed:\n{found.trace}")
        return found


def world_env(clusters: list[int]) -> list[dict[str, str]]:
    """Environments of torch worlds side by side, one per cluster of the given sizes, on loopback."""
    env = []
    for size in clusters:
        port = free_port()
        env += [
            {
                "RANK": str(r),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(r),
                "LOCAL_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            for r in range(size)
        ]
    return env


def run_clusters(
    clusters: list[int],
    function,
    *args,
    timeout: float = LIMIT_S,
    mortal: frozenset[int] = frozenset(),
    **named,
) -> list:
    """Like `run_ranks`, with each rank in the torch world of its cluster (`function` must join it)."""
    return run_ranks(
        sum(clusters),
        _with_env,
        world_env(clusters),
        function,
        *args,
        timeout=timeout,
        mortal=mortal,
        **named,
    )
