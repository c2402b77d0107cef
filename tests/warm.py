"""Scripts as processes with modules already imported, which start in a fraction of a second, not five.

They are forked from the server that also forks the ranks of tests (tests/processes.py) and lead a session;
environment, folder and output are arguments. Differences from `python script.py`: modules were imported with
the environment of the tests; all processes have the same hash seed; they cannot start `multiprocessing`
children, and no atexit functions run at their end. Tests of any of these start a normal process.
"""

import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.limits import LIMIT_S
from tests.processes import all_is_preloaded, context


class WarmProcess:
    """The parts of the interface of subprocess.Popen that tests use."""

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        env: Mapping[str, str],
        out: Path,
        err: Path,
        *,
        before: str = "",
    ):
        """`words`: the script and its arguments. `before`: code to run first, as a sitecustomize would."""
        begun, begins = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_become,
            args=(begins, list(words), str(folder), dict(env), str(out)),
            kwargs={"err": str(err), "before": before},
            daemon=True,
        )
        self._process.start()
        begins.close()
        self.pid = self._process.pid
        assert begun.poll(LIMIT_S), "the process has not started"
        begun.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a warm process", timeout)
        return self.returncode

    def terminate(self) -> None:
        self._process.terminate()


def _become(
    begins, words: list[str], folder: str, env: dict[str, str], out: str, *, err: str, before: str
) -> None:
    all_is_preloaded()
    os.setsid()
    begins.close()  # from now on its session identifies it
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for number, (path, flags) in enumerate([
        (os.devnull, os.O_RDONLY),
        (out, os.O_WRONLY),
        (err, os.O_WRONLY),
    ]):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    sys.argv[:] = words
    sys.orig_argv[:] = [sys.executable, *words]
    exec(before, {})
    runpy.run_path(words[0], run_name="__main__")
