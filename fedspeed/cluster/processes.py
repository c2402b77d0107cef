"""Process functions that the supervisor's modules share."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_M_ARENA_MAX = -8


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent dies; exit at once if that has already happened.

    Args:
        parent: the parent's pid, read before the fork.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans(adopts: bool) -> None:
    """Let this process become the parent of those below it whose parent ends, or no longer. Linux only."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopts), 0, 0, 0)


def trim_memory() -> None:
    """Give free memory back to the kernel, and let all threads allocate from one heap, since what they free
    in heaps of their own stays there. Does nothing without glibc.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.malloc_trim(0)


def exit_text(code: int) -> str:
    """Return an exit code as a message says it: `ended with exit code 1`, `was killed by SIGTERM`.

    Args:
        code: an exit code, or minus the number of the signal that killed the process.
    """
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = ""
    if -code == signal.SIGKILL:
        hint = " (by the kernel for want of memory, if nobody else did it: see dmesg)"
    return f"was killed by {name}{hint}"
