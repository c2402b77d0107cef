"""What a command prints."""

import os

from fedspeed.errors import FedSpeedError


def say(text: str) -> None:
    """Print what a command was asked for. A reader that has seen enough (`| head`) is no fault; a disk that is full is one."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more when it ends
        if not isinstance(error, BrokenPipeError):
            raise FedSpeedError(f"standard output cannot be written ({error.strerror}); send it elsewhere") from error
