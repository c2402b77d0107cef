"""Small facts about processes that the supervisor's modules share."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Asks the kernel to kill this process when its parent dies, and leaves at once if that has already
    happened.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def exit_text(code: int) -> str:
    """In words: an exit code, or minus the signal that killed the process."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = (
        " (by the kernel for want of memory, if nobody else did it: see dmesg)"
        if -code == signal.SIGKILL
        else ""
    )
    return f"was killed by {name}{hint}"
