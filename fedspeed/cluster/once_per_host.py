"""Printing an error once that many local ranks find: the first of them prints it."""

import fcntl
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from fedspeed.cluster.ranks import RankIdentity
from fedspeed.errors import EXIT_USAGE, FedSpeedError
from fedspeed.log import LOG

# Holds a path that the ranks of one attempt of the local supervisor share.
ONCE_VARIABLE = "FEDSPEED_ONCE"
# Prefix of the lock files of `run_once_per_host` in the folder for temporary files. The user's id, the
# parent's pid and the parent's start time follow.
_LOCK_PREFIX = "fedspeed-reported"


def report_error(error: FedSpeedError, env: Mapping[str, str] = os.environ) -> None:
    """Print an error without a traceback.

    All ranks of a machine find the same bad input, so under our own supervisor only one of them prints it.
    What a rank knows of a lost peer may differ from what others know, so each prints its own error.
    """
    if error.exit_code != EXIT_USAGE or claim_report(env, str(error)):
        LOG.error(str(error))


def reported_error(env: Mapping[str, str] = os.environ) -> str:
    """Return the bad input that a rank of this attempt of the local supervisor has printed (`report_error`);
    empty if none has, or under any other launcher.
    """
    try:
        return Path(env[ONCE_VARIABLE]).read_text(encoding="utf-8")
    except (KeyError, OSError):
        return ""


def claim_report(env: Mapping[str, str], text: str = "") -> bool:
    """Return whether this process is the one that reports an error which all ranks find.

    True for one process per attempt of the local supervisor; always true under any other launcher.

    Args:
        text: of the error, for `reported_error`.
    """
    path = env.get(ONCE_VARIABLE)
    if not path:
        return True
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    except OSError:
        # The supervisor and its folder are gone. A message printed twice is better than none.
        return True
    return True


def run_once_per_host(action: Callable[[], None], identity: RankIdentity) -> None:
    """Run `action` on the first of this host's ranks that calls this; return on the others when it is done.

    The others must wait: a launcher may end all ranks when one of them ends, and the action, such as printing
    an error, must be complete by then. If the first rank dies during the action, the next one runs it.

    Ranks that cannot find each other all run it, as do ranks of other hosts.

    Args:
        identity: of this rank.
    """
    if identity.world_size == 1:
        action()
        return
    path = _lock_path(os.environ)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        action()
        return
    with os.fdopen(descriptor, "r+") as file:
        _run_in_turn(action, identity, path=path, file=file)


def _run_in_turn(action: Callable[[], None], identity: RankIdentity, *, path: Path, file: TextIO) -> None:
    """Take the lock, run `action` if no other rank has, and add this rank to the list in the file.

    The last rank of this host removes the file. A rank that is already in the list belongs to a later start
    by the same parent, which begins a new list.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        ranks = file.read().split()
    except OSError:
        ranks = []
    if not ranks or str(identity.world_rank) in ranks:
        action()
        ranks = []
        _remove_stale_locks(path)
    ranks.append(str(identity.world_rank))
    try:
        file.seek(0)
        file.truncate()
        file.write(" ".join(ranks))
        file.flush()
        if len(ranks) == identity.local_size:
            path.unlink()
    except OSError:  # the other ranks run the action too
        return


def _lock_path(env: Mapping[str, str]) -> Path:
    """Return a path that all ranks of this host and start compute alike.

    It is derived from the supervisor's path, or from the process that has started all ranks.
    """
    if path := env.get(ONCE_VARIABLE):
        return Path(f"{path}-json")
    parent = os.getppid()
    return Path(tempfile.gettempdir()) / f"{_LOCK_PREFIX}-{os.getuid()}-{parent}-{_start_time(parent)}"


def _start_time(pid: int | str) -> str:
    """Return when a process started, in ticks since boot; empty if it is gone, or without /proc."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return status.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _remove_stale_locks(path: Path) -> None:
    """Remove the lock files of earlier starts whose last rank was ended before it could do so."""
    prefix = f"{_LOCK_PREFIX}-{os.getuid()}-"
    for stale in path.parent.glob(f"{prefix}*"):
        parent, _, started = stale.name.removeprefix(prefix).partition("-")
        if stale != path and _start_time(parent) != started:
            with suppress(OSError):  # another user may have made a file of this name
                stale.unlink()
