"""The command line that runs a program in bubblewrap, as a pure function of the job."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedspeed.evaluation.sandbox.limits import WORK_FOLDER, Job

USER_INSIDE = 65534  # nobody
# What compilers and interpreters need of the system; all of it is readable for every user.
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin")
SYSTEM_FILES = ("/etc/alternatives", "/etc/ld.so.cache", "/etc/java-*")
PATH = "/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True)
class Host:
    """What a command line has to know of the host.

    Attributes:
        bwrap: path of the program.
        visible: system folders and files that exist. links: system folders that are links, and their targets.
        user: id of the user that bubblewrap is started as; None: the caller's own, which is not root.
    """

    bwrap: str
    visible: tuple[str, ...]
    links: Mapping[str, str]
    user: int | None


def environment(job: Job) -> dict[str, str]:
    """Return all environment variables of a job."""
    return {"PATH": PATH, "HOME": WORK_FOLDER, "TMPDIR": WORK_FOLDER, "LANG": "C.UTF-8", **job.environment}


def command(job: Job, host: Host, *, seccomp: int, files: Mapping[str, int]) -> list[str]:
    """Return the command line of a job.

    The kernel counts processes of root towards no limit, in a user namespace as little as outside. Started by
    root, bubblewrap therefore runs as another user from the beginning.

    Args:
        seccomp: descriptor of the filter. files: descriptors of the job's files by path.
    """
    words = []
    if host.user is not None:
        words += ["setpriv", f"--reuid={host.user}", f"--regid={host.user}", "--clear-groups", "--"]
    words += [
        host.bwrap,
        *("--unshare-all", "--unshare-user", "--disable-userns"),
        *("--die-with-parent", "--new-session", "--cap-drop", "ALL"),
        *("--uid", str(USER_INSIDE), "--gid", str(USER_INSIDE), "--hostname", "sandbox"),
    ]
    for folder in (*host.visible, *job.folders):
        words += ["--ro-bind", folder, folder]
    for link, target in host.links.items():
        words += ["--symlink", target, link]
    words += ["--proc", "/proc", "--dev", "/dev", "--size", str(job.limits.disk), "--tmpfs", WORK_FOLDER]
    for name, descriptor in files.items():
        words += ["--file", str(descriptor), f"{WORK_FOLDER}/{name}"]
    words += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", WORK_FOLDER]
    words += ["--seccomp", str(seccomp), "--", *limited(job)]
    return words


def limited(job: Job) -> list[str]:
    """Return the command that compiles and runs a job under the limits of one process.

    A process may allocate as much as all may keep in RAM. RLIMIT_DATA counts what can be written, and thus
    not the address space that Node, Go and Java reserve; RLIMIT_AS would.
    """
    limits = job.limits
    run = [
        *("prlimit", f"--cpu={limits.run_cpu_s}", "--"),
        *("timeout", "--signal=KILL", str(limits.run_wall_s), *job.run),
    ]
    script = (
        f"{shlex.join(job.compile)} && exec {shlex.join(run)}" if job.compile else f"exec {shlex.join(run)}"
    )
    return [
        "prlimit",
        f"--nproc={limits.processes}",
        f"--data={limits.memory}",
        f"--cpu={limits.cpu_s}",
        f"--fsize={limits.disk}",
        *("--nofile=256", "--core=0", "--msgqueue=0", "--memlock=65536", "--"),
        *("sh", "-c", script),
    ]


def as_text(words: Sequence[str]) -> str:
    """Return a command line as one would type it."""
    return shlex.join(words)
