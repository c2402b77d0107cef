"""One virtual host: its namespaces, mounts, network cable and sshd."""

import os
import select
import shutil
import signal
import subprocess
from pathlib import Path

from tests.lab.errors import LabError
from tests.lab.hosts import LabHost
from tests.lab.network import plug, unplug
from tests.lab.processes import START_TIMEOUT_S, EnteredProcess, descend
from tests.lab.ssh import SSHD

_END_TIMEOUT_S = 120.0

# The script of the host's first process, which prints `ready` after all mounts. /sys is mounted again because
# it shows the network devices of the namespace that mounted it. The lab's ssh is mounted over the machine's,
# so that no program on the host uses the user's keys and configuration, whatever its PATH is.
_BOOT = """\
set -e
name=$1 folder=$2 ssh=$3
hostname "$name"
mount --bind "$folder/hosts/$name" "$folder/tmp"
mount --bind "$folder/etc-hosts" /etc/hosts
mount --bind "$folder/ssh/ssh" "$ssh"
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
echo ready
exec >/dev/null 2>&1
exec env --ignore-signal=CHLD sleep infinity
"""


class Machine:
    """A virtual host that is starting, running or down. The constructor starts it and does not wait, so that
    several hosts can start at the same time.

    Args:
        folder: the lab's folder, with the mounted files: hosts/NAME (the host's files), tmp, etc-hosts and
            ssh/.
        lab_pid: the first process of the lab's namespaces.
    """

    def __init__(self, host: LabHost, folder: Path, lab_pid: int):
        self.host = host
        self._folder = folder
        self._lab_pid = lab_pid
        self._pid: int | None = None
        self._process = subprocess.Popen(
            [
                "nsenter",
                f"--target={lab_pid}",
                "--net",
                "--pid",
                "--",
                "unshare",
                "--net",
                "--pid",
                "--uts",
                "--ipc",
                "--mount",
                "--fork",
                "--mount-proc",
                "--",
                "sh",
                "-c",
                _BOOT,
                "boot",
                host.name,
                str(folder),
                shutil.which("ssh"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish_boot(self) -> None:
        """Wait for the mounts, connect the host to the network and start its sshd.

        Raises:
            LabError: one of the steps failed.
        """
        with self._process.stdout as out, self._process.stderr as err:
            answered, _, _ = select.select([out], [], [], START_TIMEOUT_S)
            if not answered or out.readline() != "ready\n":
                self._process.kill()
                raise LabError(f"host {self.host.name} does not start: {err.read().strip() or 'no answer'}")
        self._pid = descend(self._process, 2)  # nsenter, then unshare, then the host
        plug(self.host, self._lab_pid, self._pid)
        sshd = self.enter(
            [SSHD, "-f", str(self._folder / "ssh" / "sshd_config")],
            "/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said, _ = sshd.communicate(timeout=START_TIMEOUT_S)  # it goes to the background once it listens
        if sshd.returncode != 0:
            raise LabError(f"host {self.host.name}: sshd does not start: {said.strip()}")

    @property
    def up(self) -> bool:
        return self._pid is not None and self._process.poll() is None

    def enter(self, command: list[str], cwd: str, **popen) -> EnteredProcess:
        """Start `command` on this host.

        Raises:
            LabError: it is down.
        """
        if not self.up:
            raise LabError(f"host {self.host.name} is down")
        return EnteredProcess(self._pid, command, cwd, **popen)

    def power_off(self) -> None:
        """Remove the cable, so that connections are not closed regularly, and then kill all processes.

        Raises:
            LabError: it is down already, or does not end in time.
        """
        if not self.up:
            raise LabError(f"host {self.host.name} is down")
        unplug(self.host, self._lab_pid)
        os.kill(self._pid, signal.SIGKILL)
        self.reap()

    def reap(self) -> None:
        """Wait until all processes of a host that is ending have ended.

        Raises:
            LabError: they did not end in time.
        """
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise LabError(f"host {self.host.name} did not end within {_END_TIMEOUT_S:.0f} s") from None
