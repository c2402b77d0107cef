"""A replacement of launch.py in tests of launch scripts: every rank prints its number, host and arguments.

With the argument `wait`, a rank runs until a SIGTERM or SIGUSR1, then takes a while to "save" and ends with
exit status 75. With `stagger`, every rank takes much longer than the one before it.
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
    report(rank=int(rank), host=socket.gethostname(), args=sys.argv[1:], mpi_size=mpi_size, environ=environ)
    if "wait" not in sys.argv:
        return 0
    deadline = time.monotonic() + START_TIMEOUT_S
    while not asked and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(SAVE_S + ("stagger" in sys.argv) * SAVE_S * int(rank))
    report(saved=int(rank), asked=bool(asked))
    return 75


def report(**values) -> None:
    """Print a line of JSON with a single write, so that lines of different ranks cannot mix."""
    os.write(1, (json.dumps(values) + "\n").encode())


sys.exit(main())
