"""A network namespace for a run: nothing of it reaches another network, and its loopback counts its bytes.

The loopback of a new namespace is its only interface. What processes exchange in shared memory (MPI on one
node, Ray's object store) crosses no interface and is not counted. Every process of the run is known by its
namespace, also one that has left the run's session. Without the rights to make one (root), a run takes place
in the machine's own network, its processes are those of its session, and bytes are not counted.
"""

import contextlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks.compare.processes import session_processes

# `cat` holds the namespace until the end of its input, which is a pipe from us: also when we are killed.
HOLD = ("unshare", "--net", "sh", "-c", "ip link set lo up && echo up && exec cat")


class Network:
    """The network of one run; a context manager.

    Attributes:
        isolated: whether it is a namespace of its own.
    """

    def __init__(self) -> None:
        self.isolated = False
        self._holder: subprocess.Popen[bytes] | None = None
        self._inode = 0

    def __enter__(self) -> "Network":
        if os.geteuid() == 0:
            with contextlib.suppress(FileNotFoundError):  # no unshare
                self._hold()
        return self

    def __exit__(self, *_: object) -> None:
        if self._holder is not None:
            assert self._holder.stdin is not None and self._holder.stdout is not None
            self._holder.stdin.close()
            self._holder.stdout.close()
            self._holder.wait()

    def _hold(self) -> None:
        self._holder = subprocess.Popen(
            HOLD,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._holder.stdout is not None
        self.isolated = self._holder.stdout.readline() == b"up\n"
        if self.isolated:
            self._inode = os.stat(f"/proc/{self._holder.pid}/ns/net").st_ino
            assert self._inode != os.stat("/proc/self/ns/net").st_ino

    def inside(self, command: Sequence[str]) -> list[str]:
        """Return the command that runs a command in this network, as the same process."""
        if not self.isolated:
            return list(command)
        assert self._holder is not None
        return ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net", "--", *command]

    def processes(self, session: int) -> list[Path]:
        """Return the folders in /proc of all processes of the run.

        Args:
            session: of its first process, for a network that is not isolated.
        """
        if not self.isolated:
            return session_processes(session)
        assert self._holder is not None
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended while we looked
                if os.stat(process / "ns" / "net").st_ino == self._inode:
                    found.append(process)
        return [process for process in found if int(process.name) != self._holder.pid]

    def loopback_bytes(self) -> int | None:
        """Return the bytes that have been sent over the loopback; None: they are not counted."""
        if not self.isolated:
            return None
        assert self._holder is not None
        return sent_bytes(Path(f"/proc/{self._holder.pid}/net/dev").read_text())


def sent_bytes(table: str) -> int:
    """Return the bytes sent over the loopback, from the text of /proc/net/dev."""
    line = next(line for line in table.splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":", 1)[1].split()[8])
