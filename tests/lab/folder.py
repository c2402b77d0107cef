"""The folder of a lab, and labs that have crashed.

The processes, namespaces, links and mounts of a lab end with its first process, which ends with its owner
(see supervisor.py). Only the folder can remain, if the supervisor was killed too. Its `lab.json` lists the
processes of the lab, each by (pid, start time), so that a recycled pid is never mistaken for one of them.
"""

import json
import os
import shutil
import signal
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.lab.errors import LabError
from tests.lab.processes import start_time, wait_gone

PREFIX = "fedspeed-lab-"
_STATE = "lab.json"
_UNFINISHED_AGE_S = 60.0
_END_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class LabState:
    """The processes and hosts of a lab; each process is (pid, start time)."""

    owner: tuple[int, int]
    supervisor: tuple[int, int] | None = None
    init: tuple[int, int] | None = None
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lab:
    """A lab as its folder describes it. `running`: a process of it will remove the folder. `state` is None
    until it has been written.
    """

    folder: Path
    state: LabState | None
    running: bool

    @property
    def id(self) -> str:
        return self.folder.name.removeprefix(PREFIX)


def make_folder() -> Path:
    """Make a folder that only its owner can read in the machine's temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
    write_state(folder, LabState(owner=identity(os.getpid())))
    return folder


def write_state(folder: Path, state: LabState) -> None:
    draft = folder / f"{_STATE}.new"
    draft.write_text(json.dumps(asdict(state)))
    draft.replace(folder / _STATE)


def identity(pid: int) -> tuple[int, int]:
    """Return (pid, start time) of a running process.

    Raises:
        LabError: it is not running.
    """
    started = start_time(pid)
    if started is None:
        raise LabError(f"process {pid} of the lab has ended unexpectedly")
    return pid, started


def find_labs() -> list[Lab]:
    """Return all labs of this machine, running or not, by name."""
    return [
        lab
        for folder in sorted(Path(tempfile.gettempdir()).resolve().glob(f"{PREFIX}*"))
        if (lab := _look(folder)) is not None
    ]


def remove_lab(lab: Lab) -> None:
    """End the lab's processes, if there are any, and remove its folder.

    Raises:
        LabError: they did not end in time.
    """
    if lab.state is not None:
        # All namespaces end with the first process of the lab; a running supervisor then removes the folder.
        for process in (lab.state.init, lab.state.supervisor):
            if process is None or not _alive(process):
                continue
            if process == lab.state.init:
                os.kill(process[0], signal.SIGKILL)
            if not wait_gone(*process, _END_TIMEOUT_S):
                raise LabError(
                    f"lab {lab.id}: process {process[0]} did not end within {_END_TIMEOUT_S:.0f} s"
                )
    if lab.folder.exists():
        shutil.rmtree(lab.folder)


def _look(folder: Path) -> Lab | None:
    """Return the lab of a folder; None if it ends meanwhile."""
    try:
        made = folder.stat().st_mtime
        if not (folder / _STATE).exists():
            return Lab(folder, None, running=time.time() - made < _UNFINISHED_AGE_S)
        content = json.loads((folder / _STATE).read_text())
    except FileNotFoundError:
        return None
    state = LabState(**{
        name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
    })
    return Lab(folder, state, running=_alive(state.supervisor or state.owner))


def _alive(process: tuple[int, int]) -> bool:
    return start_time(process[0]) == process[1]
