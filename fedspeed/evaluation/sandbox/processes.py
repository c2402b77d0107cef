"""What the processes below another one use, read from /proc."""

import os
from dataclasses import dataclass
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Usage:
    """What some processes use now.

    Attributes:
        processes: their number. threads: of all of them. memory: bytes in RAM; a page that several of them
            share counts for each.
    """

    processes: int
    threads: int
    memory: int


def descendants(pid: int) -> list[int]:
    """Return the processes below one, without it, parents before their children.

    A process whose parent has ended belongs to the first process of its namespace, which is among them.
    """
    found: list[int] = []
    pending = [pid]
    while pending:
        parent = pending.pop(0)
        try:
            threads = os.listdir(f"/proc/{parent}/task")
        except OSError:
            continue
        for thread in threads:
            try:
                children = Path(f"/proc/{parent}/task/{thread}/children").read_text()
            except OSError:
                continue
            found += map(int, children.split())
            pending += map(int, children.split())
    return found


def usage(pids: list[int]) -> Usage:
    """Return what processes use; one that has ended in between uses nothing."""
    threads = 0
    pages = 0
    for pid in pids:
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            threads += len(os.listdir(f"/proc/{pid}/task"))
        except (OSError, IndexError):
            continue
    return Usage(len(pids), threads, pages * _PAGE)


def files_in_sandbox(pid: int, folder: str, size: int) -> int:
    """Return the number of files on the file system of a process's work folder.

    Args:
        folder: as the process sees it. size: bytes of that file system, by which it is recognised while the
            sandbox is still being built.
    """
    try:
        state = os.statvfs(f"/proc/{pid}/root{folder}")
    except OSError:
        return 0
    return state.f_files - state.f_ffree if state.f_blocks * state.f_frsize == size else 0
