"""The process that outlives the owner of a lab just long enough to remove everything."""

import os
import subprocess
from pathlib import Path

from tests.lab.errors import LabError
from tests.lab.folder import LabState, identity, write_state
from tests.lab.processes import descend

_CLOSE_TIMEOUT_S = 120.0

# `cat` is process 1 of a new PID namespace. It ends when its input does, and the owner, who holds the other
# end of that pipe, need not be able to close it: the kernel does, also after `kill -9`. The end of process 1
# kills every process of its namespace and of those nested in it, and with the last process of a network or
# mount namespace its links and mounts are gone too. Child signals are ignored so that the kernel reaps the
# orphans that process 1 inherits.
_SCRIPT = """\
unshare --net --pid --fork -- env --ignore-signal=CHLD cat
exec rm -rf --one-file-system -- "$1"
"""


class Supervisor:
    """Holds a PID namespace and a network namespace open until `close`, or until this process ends, however
    it ends.

    Attributes:
        init_pid: the namespaces' first process.
    """

    def __init__(self, folder: Path, hosts: tuple[str, ...]):
        # A session of its own: Ctrl-C and signals to the owner's group must not reach the one who cleans up.
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
        """Ends all processes in the namespaces and removes the folder. May be called again.

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
