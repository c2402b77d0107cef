"""`--json`: one JSON object per line on stdout, and nothing else there."""

import json
import os
import sys
from contextlib import suppress
from typing import TextIO

from fedspeed.errors import FedSpeedError


def claim_stdout() -> TextIO:
    """Take the process's stdout: from now on only the returned stream writes there, and all that anything
    else prints goes to stderr.

    DeepSpeed logs on stdout, and so do compilers it starts; redirecting the descriptor rather than sys.stdout
    catches those too. Call it before anything is imported that keeps a reference to stdout, and on every
    rank, since launchers merge the ranks' outputs.
    """
    sys.stdout.flush()
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


class JsonLines:
    """Writes objects to `stream`. A reader that goes away (`| head -1`) ends the output, not the run;
    `rounds.jsonl` has it all.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, event: str, values: dict) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(json.dumps({"event": event, **values}, allow_nan=False) + "\n")
            self._stream.flush()
        except BrokenPipeError:
            lost = self._stream
            self._stream = None
            with suppress(
                BrokenPipeError
            ):  # closing flushes once more; left to the interpreter's exit it would turn into an exit code
                lost.close()


def write_refusal(stream: TextIO, error: FedSpeedError) -> None:
    """A run that is refused, as an object on the stream of `--json`: what stands on stderr, and the exit
    code.
    """
    JsonLines(stream).write("error", {"error": str(error), "exit_code": error.exit_code})
    error.printed_as_json = True


class NoJson:
    """For runs without `--json`."""

    def write(self, event, values):
        pass
