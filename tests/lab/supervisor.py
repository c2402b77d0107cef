"""The process that removes everything of a lab after its owner has ended."""

import os
import subprocess
from pathlib import Path

from tests.lab.errors import LabError
from tests.lab.folder import LabState, identity, write_state
from tests.lab.processes import descend

_CLOSE_TIMEOUT_S = 120.0

# `cat` is process 1 of a new PID namespace. It ends at the end of its input, a pipe from the owner, which the
# kernel closes even after `kill -9`. The end of process 1 kills every process of its namespace and of nested
# ones. The links and mounts of a network or mount namespace end with its last process. Child signals are
# ignored so that the kernel reaps the orphans that process 1 inherits.
_SCRIPT = """\
unshare --net --pid --fork -- env --ignore-signal=CHLD cat
exec rm -rf --one-file-system -- "$1"
"""


class Supervisor:
    """Hold a PID namespace and a network namespace open until `close` or the end of this process.

    Attributes:
        init_pid: the first process of the namespaces.
    """

    def __init__(self, folder: Path, hosts: tuple[str, ...]):
        # In a new session, because Ctrl-C and signals to the owner's group must not reach it.
        self._process = subprocess.Popen(
            ["sh", "-c", _SCRIPT, "fedspeed-lab", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        init = descend(self._process, 2)
        if init is None:
            raise LabError(
                f"cannot make namespaces: {self._process.stderr.read().decode(errors='replace').strip()}"
            )
        self.init_pid = init
        write_state(
            folder, LabState(identity(os.getpid()), identity(self._process.pid), identity(init), hosts)
        )

    def close(self) -> None:
        """End all processes in the namespaces and remove the folder. May be called again.

        Raises:
            LabError: it took longer than _CLOSE_TIMEOUT_S.
        """
        self._process.stdin.close()
        try:
            self._process.wait(_CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise LabError(
                f"the lab did not end within {_CLOSE_TIMEOUT_S:.0f} s; see `python -m tests.lab list`"
            ) from None
        self._process.stderr.close()
