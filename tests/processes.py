"""Run a function on several ranks, as real processes, with a deadline.

The processes are forked from one server that has imported the heavy libraries once: a test with four ranks costs one import.
"""

import multiprocessing
import os
import time
import traceback

from fedspeed.cluster.ports import free_port

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["deepspeed", "peft", "transformers.models.llama.modeling_llama"])


def free_ports(count: int) -> list[int]:
    """Different ones."""
    found: dict[int, None] = {}
    while len(found) < count:
        found[free_port()] = None
    return list(found)


def _rank(pipe, function, rank, world, args):
    try:
        pipe.send((True, function(rank, *args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()


def _with_env(rank, env, function, *args):
    os.environ.update(env[rank])
    return function(rank, *args)


def run_ranks(world: int, function, *args, timeout: float = 120, mortal: frozenset[int] = frozenset()) -> list:
    """`[function(rank, *args) for rank in range(world)]`, each in a process of its own; raises if any fails or is late. None for a mortal one
    that has died without a word."""
    pipes, processes = [], []
    try:
        for rank in range(world):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(target=_rank, args=(theirs, function, rank, world, args), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        end, results, failures = time.monotonic() + timeout, {}, []
        while len(results) < world and not failures:
            waiting = [p for r, p in enumerate(pipes) if r not in results]
            ready = multiprocessing.connection.wait(waiting, timeout=max(0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks {[r for r in range(world) if r not in results]} of {world} gave no answer in {timeout} s")
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


def world_env(clusters: list[int]) -> list[dict[str, str]]:
    """Environments of torch worlds side by side, one per cluster of the given sizes, on loopback."""
    env = []
    for size in clusters:
        port = free_port()
        env += [{"RANK": str(r), "WORLD_SIZE": str(size), "LOCAL_RANK": str(r), "LOCAL_SIZE": str(size),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} for r in range(size)]
    return env


def run_clusters(clusters: list[int], function, *args, timeout: float = 180, mortal: frozenset[int] = frozenset()) -> list:
    """Like `run_ranks`, with each rank in the torch world of its cluster (`function` must join it)."""
    return run_ranks(sum(clusters), _with_env, world_env(clusters), function, *args, timeout=timeout, mortal=mortal)
