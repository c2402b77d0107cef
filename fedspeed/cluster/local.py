"""`python launch.py` on one machine: run the local ranks under a supervisor.

The supervisor imports no torch and does no training, so it stays small and survives whatever happens to a
rank.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedspeed.cluster.devices import usable_cores, visible_gpus
from fedspeed.cluster.layout import SERVER_RANKS_VARIABLE
from fedspeed.cluster.supervisor import Signals, Supervisor
from fedspeed.cluster.worker_group import ForkedGroup, PreloadFailed, SpawnedGroup, WorkerGroup
from fedspeed.net.ports import RESOLVER_OPTIONS, RESOLVER_VARIABLE

# Seconds that ranks have to end once one of them is lost and the round cannot be finished.
END_S = 5.0


@dataclass(frozen=True, kw_only=True)
class LocalRun:
    """The outcome of a run of local ranks.

    Attributes:
        exit_code: of the whole run. 0: all ranks ended well. 2: bad input. 75: a rank was lost and no restart
            is left, or a signal requested the end; the same command resumes. 1: anything else.
        restarts: how often all ranks were started again.
        started: time of the last start, in seconds since 1970.
        stop_requested: whether a signal requested the end.
        messages: what the supervisor logged.
    """

    exit_code: int
    restarts: int
    started: float
    stop_requested: bool
    messages: tuple[str, ...]


def run_local(
    argv: Sequence[str],
    ranks: int,
    env: Mapping[str, str],
    max_restarts: int,
    last_round: Callable[[], int] | None,
    *,
    preload: Callable[[], None] | None = None,
    target: Callable[[dict[str, str]], int] | None = None,
    servers: int = 0,
    finish_s: float = 25.0,
    end_s: float = END_S,
) -> LocalRun:
    """Run local ranks to their end.

    If a rank dies, the others are ended, and all start again from the journal while restarts are left. A
    restart counts only if no round was finished since the start before it. An exception that occurs again
    without a new round would occur a third time, so it ends the run. SIGTERM, SIGINT, SIGHUP and SIGUSR1 are
    passed on as SIGTERM, once; a second one ends everything at once. Ranks that have not begun never do.

    Args:
        argv: arguments of the script. Spawned ranks run the same script as this process, by the same
            interpreter.
        ranks: number of ranks, servers included.
        env: environment of the ranks; RANK, WORLD_SIZE and the like are added.
        max_restarts: how many restarts are allowed without a newly finished round; 0: none at all.
        last_round: returns the number of the last round in the journal; None: there is no journal, and so a
            single attempt.
        preload, target: if both are given, no GPU is visible and this is Linux, ranks are forked from a
            process that has run `preload`, and run `target(environment)`. Else each is a new process.
        servers: how many of the ranks, the last ones, are the method's server if no hostfile says so.
        finish_s: seconds that ranks have to finish their round after a signal.
        end_s: seconds that they have to end once another rank is lost.
    """
    common = _common_environment(env, ranks, servers)
    spawned = SpawnedGroup(common, [*_command_of_this_process(), *argv])
    workers: WorkerGroup = spawned
    if preload and target and sys.platform == "linux" and not visible_gpus(env):
        workers = ForkedGroup(common, preload, target)
    with Signals() as signals, tempfile.TemporaryDirectory(prefix="fedspeed-") as folder:
        supervisor = Supervisor(workers, ranks, Path(folder), signals=signals, finish_s=finish_s, end_s=end_s)
        try:
            code = supervisor.run(max_restarts, last_round)
        except PreloadFailed as error:
            if error.threads:
                supervisor.log(f"starting each rank as a fresh process, which takes longer: {error}")
                supervisor.workers = spawned
                code = supervisor.run(max_restarts, last_round)
            else:
                supervisor.log(f"the ranks could not be prepared: {error}")
                code = error.code
        finally:
            supervisor.workers.close()
    return LocalRun(
        exit_code=code,
        restarts=supervisor.restarts,
        started=supervisor.started,
        stop_requested=supervisor.stop_requested,
        messages=tuple(supervisor.messages),
    )


def _common_environment(env: Mapping[str, str], ranks: int, servers: int) -> dict[str, str]:
    """Return the environment that all ranks share; each has an equal part of the cores for its threads."""
    return {
        RESOLVER_VARIABLE: RESOLVER_OPTIONS,
        **env,
        "FEDSPEED_LAUNCH": "local",
        SERVER_RANKS_VARIABLE: str(servers),
        "OMP_NUM_THREADS": env.get("OMP_NUM_THREADS") or str(max(1, usable_cores() // ranks)),
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
    }


def _command_of_this_process() -> list[str]:
    """Return the command of this process without its arguments: a script, `-m package`, a console script."""
    arguments = len(sys.argv) - 1
    return [sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - arguments]]
