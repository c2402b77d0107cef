"""What a command prints."""

import os
import sys
import time
from typing import TextIO

from fedspeed.errors import EXIT_USAGE, FedSpeedError

SPEAK_S = 1.0  # for the rank that speaks JSON for all


def say(text: str) -> None:
    """Print what a command was asked for. A reader that has seen enough (`| head`) is no fault; a disk that is full is one."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more when it ends
        if not isinstance(error, BrokenPipeError):
            raise FedSpeedError(f"standard output cannot be written ({error.strerror}); send it elsewhere") from error


def refuse(error: FedSpeedError, json_out: TextIO | None) -> int:
    """Say what ended a command, on stderr, and where `json_out` is given as an object there; returns the exit code.

    Of a job's ranks, all of which may have found the same, one speaks JSON.
    """
    from fedspeed.cluster.discover import is_first_rank
    from fedspeed.cluster.once import report
    from fedspeed.monitor.stdout import tell_refusal

    sys.stdout.flush()
    report(error)
    if json_out is not None and error.exit_code == EXIT_USAGE and not error.in_json:
        if is_first_rank():
            tell_refusal(json_out, error)
        else:
            time.sleep(SPEAK_S)  # a launcher may end all ranks when the first of them ends
    return error.exit_code
