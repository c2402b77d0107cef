"""A stand-in for launch.py in tests of what starts it: every rank says who it is, and how it was asked to
stop.

Arguments are echoed. `wait` among them: the rank goes on until a SIGTERM or SIGUSR1, then needs a while to
    "save" and ends with exit
status 75; with `stagger` every rank needs much longer than the one before.
"""

import json
import os
import signal
import socket
import sys
import time

START_TIMEOUT_S = 500.0
SAVE_S = 2.0  # longer than mpirun's patience of one second, shorter than the KillWait of the lab's Slurm


def main() -> int:
    asked = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: asked.append(True))
    rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["SLURM_PROCID"]
    mpi_size = None
    if "PMIX_RANK" in os.environ:
        from mpi4py import MPI

        mpi_size = MPI.COMM_WORLD.size
    environ = {
        name: os.environ[name]
        for name in ("DS_ACCELERATOR", "VENV_MARK", "PBS_NODEFILE")
        if name in os.environ
    }
    say(rank=int(rank), host=socket.gethostname(), args=sys.argv[1:], mpi_size=mpi_size, environ=environ)
    if "wait" not in sys.argv:
        return 0
    deadline = time.monotonic() + START_TIMEOUT_S
    while not asked and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(SAVE_S + ("stagger" in sys.argv) * SAVE_S * int(rank))
    say(saved=int(rank), asked=bool(asked))
    return 75


def say(**words) -> None:
    """One write, so that lines of different ranks cannot mix."""
    os.write(1, (json.dumps(words) + "\n").encode())


sys.exit(main())
