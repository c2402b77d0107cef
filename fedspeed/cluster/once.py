"""One voice for many local ranks: a usage error that all of them find is told by the first one only."""

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

ONCE_VARIABLE = "FEDSPEED_ONCE"
# files of `run_once_per_host` in the folder for temporary ones: this, user, parent, when the parent began
_TOLD = "fedspeed-told"


def report_error(error: FedSpeedError, env: Mapping[str, str] = os.environ) -> None:
    """Prints an error without a traceback.

    Bad input looks the same from every rank of a machine, so under our own supervisor only one of them prints
    it. A lost peer is what a rank alone can tell; each says what it saw.
    """
    if error.exit_code != EXIT_USAGE or claim_report(env):
        LOG.error(str(error))


def claim_report(env: Mapping[str, str]) -> bool:
    """True for one process per attempt of the local supervisor; always True under any other launcher."""
    path = env.get(ONCE_VARIABLE)
    if not path:
        return True
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:
        # The supervisor and its folder are gone; better said twice than not at all.
        return True
    return True


def run_once_per_host(tell: Callable[[], None], identity: RankIdentity) -> None:
    """Call `tell` on the first of this host's ranks that comes here. The others come back when it has told: a
    launcher may end all ranks when one of them ends, and none may end before the word is out. Should the
    teller die, the next one tells.

    Ranks that cannot find each other all tell: better twice than not at all. So do those of another host,
    which may have found something else.

    Args:
        identity: of this rank.
    """
    if identity.world_size == 1:
        tell()
        return
    path = _meeting_place(os.environ)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        tell()
        return
    with os.fdopen(descriptor, "r+") as file:
        _tell_in_turn(tell, identity, path, file)


def _tell_in_turn(tell: Callable[[], None], identity: RankIdentity, path: Path, file: TextIO) -> None:
    """The file lists the ranks that have come by; it goes with the last one of this host. A rank that finds
    itself there is in a later start by the same parent, whose list begins anew.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        ranks = file.read().split()
    except OSError:
        ranks = []
    if not ranks or str(identity.world_rank) in ranks:
        tell()
        ranks = []
        _sweep(path)
    ranks.append(str(identity.world_rank))
    try:
        file.seek(0)
        file.truncate()
        file.write(" ".join(ranks))
        file.flush()
        if len(ranks) == identity.local_size:
            path.unlink()
    except OSError:  # the others tell too
        return


def _meeting_place(env: Mapping[str, str]) -> Path:
    """A file that the ranks of this host and start name alike: the supervisor's, or one named after what
    started them all.
    """
    if path := env.get(ONCE_VARIABLE):
        return Path(f"{path}-json")
    parent = os.getppid()
    return Path(tempfile.gettempdir()) / f"{_TOLD}-{os.getuid()}-{parent}-{_began(parent)}"


def _began(pid: int | str) -> str:
    """When a process began, in ticks since the machine did; empty where there is none, or no /proc."""
    try:
        return (
            Path(f"/proc/{pid}/stat")
            .read_text(encoding="utf-8", errors="replace")
            .rpartition(")")[2]
            .split()[19]
        )
    except (OSError, IndexError):
        return ""


def _sweep(path: Path) -> None:
    """Remove the files of earlier starts whose ranks were ended before the last of them came by."""
    mine = f"{_TOLD}-{os.getuid()}-"
    for old in path.parent.glob(f"{mine}*"):
        parent, _, began = old.name.removeprefix(mine).partition("-")
        if old != path and _began(parent) != began:
            with suppress(OSError):  # of another's file by this name
                old.unlink()
