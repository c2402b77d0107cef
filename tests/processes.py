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
    """Return the first of `count` consecutive ports, reserved among all workers until this process ends.

    A socket that does not listen is bound to each of them. A server with SO_REUSEADDR can still listen on the
    port, but other tests find it in use.
    """
    while True:
        first = ports.free_port()
        try:
            _held.extend([_hold(first + i) for i in range(count)])
        except OSError:
            continue
        return first


def free_ports(count: int) -> list[int]:
    """Return this many different ports, reserved as in `free_port`."""
    return [free_port() for _ in range(count)]


def _hold(port: int) -> socket.socket:
    with socket.socket() as probe:
        probe.bind(("", port))
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("", port))
    return holder


def all_is_preloaded() -> None:
    """Assert that the server made all imports: it ignores failures, and each process would repeat them."""
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


DEATH_S = 1.0  # from a rank's failure until another one that died before is gone


def run_ranks(
    world: int, function, *args, timeout: float = LIMIT_S, mortal: frozenset[int] = frozenset(), **named
) -> list:
    """Return `[function(rank, *args, **named) for rank in range(world)]`, each from a separate process.

    Args:
        mortal: ranks that may die without a result, which is then None.

    Raises:
        AssertionError: a rank failed.
        TimeoutError: a rank was late.
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
            while ready:
                for pipe in ready:
                    rank = pipes.index(pipe)
                    try:
                        good, value = pipe.recv()
                    except EOFError:
                        good, value = (True, None) if rank in mortal else (False, "died without a word")
                    results[rank] = value
                    if not good:
                        failures.append(f"rank {rank}:\n{value}")
                # What a rank says may be the consequence of another one's death, which is not over yet.
                waiting = [p for r, p in enumerate(pipes) if r not in results]
                ready = multiprocessing.connection.wait(waiting, timeout=DEATH_S) if failures else []
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
    """A scenario that failed, and its traceback."""

    trace: str


class Scenarios(dict):
    """Results of scenarios by name. Reading the result of a failed one raises, so that only the tests that
    need it fail.
    """

    def play(self, name, scenario, *args, **options) -> None:
        """Keep what `scenario(*args, **options)` returns or how it failed."""
        try:
            self[name] = scenario(*args, **options)
        except Exception:
            self[name] = Failed(traceback.format_exc())

    def play_together(self, world, name, scenario, *args, **options) -> None:
        """Do the same on all ranks of the worlds (federation/runs.World) and wait for all of them, so that a
        rank that failed early does not begin the next scenario alone.
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
    """Return the environment of each rank of torch worlds on loopback, one world per cluster size."""
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
    """Run ranks as `run_ranks` does, each in the torch world of its cluster, which `function` must join."""
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
