"""What a command prints."""

import os
import sys
from typing import TextIO

from fedspeed.errors import EXIT_USAGE, FedSpeedError


def say(text: str) -> None:
    """Print what a command was asked for. A reader that has seen enough (`| head`) is no fault; a disk that is full is one."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more when it ends
        if not isinstance(error, BrokenPipeError):
            raise FedSpeedError(f"standard output cannot be written ({error.strerror}); send it elsewhere") from error


def refuse(error: FedSpeedError, json_out: TextIO | None) -> int:
    """Say what ended a command, on stderr, and where `json_out` is given as an object there; returns the exit code."""
    from fedspeed.cluster.once import report

    sys.stdout.flush()
    report(error)
    if json_out is not None and error.exit_code == EXIT_USAGE and not error.in_json:
        tell_json(error, json_out)
    return error.exit_code


def tell_json(error: FedSpeedError, json_out: TextIO) -> None:
    """Bad input in the words of `--json`, before the ranks have met: of those on this host, which may all have found the same, one speaks."""
    from fedspeed.cluster.discover import own_identity
    from fedspeed.cluster.once import tell_once
    from fedspeed.monitor.stdout import tell_refusal

    tell_once(lambda: tell_refusal(json_out, error), own_identity())
