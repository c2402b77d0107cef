"""The local supervisor as a real process, as tests start and watch it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import ROOT
from tests.limits import LIMIT_S

SCRIPT = Path(__file__).parent / "supervised_script.py"
RANKS = 3


class Supervised:
    """A running supervisor with its ranks."""

    def __init__(self, folder, way, mode):
        self.folder = folder
        env = {
            key: value
            for key, value in os.environ.items()
            if key not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
        }
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), way, mode],
            env={**env, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, within_s=LIMIT_S):
        """Return exit code, output and errors, and assert that no process of any rank is left."""
        try:
            output, errors = self.process.communicate(timeout=within_s)
        finally:
            self.process.kill()
        self.nobody_is_left()
        return self.process.returncode, output, errors

    def notes(self, life=0):
        """Return what the ranks of a life wrote: pid, pid of the parent and environment."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob(f"life-{life}-rank-?"))]

    def lives(self):
        """Return how often the ranks were started."""
        return len({path.name.split("-")[1] for path in self.folder.glob("life-*-rank-?")})

    def await_ranks(self):
        """Wait until all ranks of the first life run and return their notes."""
        _wait_until(lambda: len(self.notes()) == RANKS, "the ranks did not start")
        return self.notes()

    def await_file(self, name):
        """Wait until a file is there."""
        _wait_until((self.folder / name).exists, f"{name} did not appear")

    def nobody_is_left(self, within_s=LIMIT_S):
        """Assert that all ranks and their parents end in time."""
        deadline = time.monotonic() + within_s
        pids = {
            json.loads(path.read_text())[key]
            for path in self.folder.glob("life-*-rank-?")
            for key in ("pid", "parent")
        }
        while any(is_running(pid) for pid in pids):
            assert time.monotonic() < deadline, "a rank or its parent outlived the supervisor"
            time.sleep(0.02)


def _wait_until(condition, fault):
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, fault
        time.sleep(0.01)


def is_running(pid):
    """Say whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
