"""`--json`: one JSON object per line on stdout, and nothing else there."""

import json
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

from fedspeed.errors import FedSpeedError


def claim_stdout() -> TextIO:
    """Take over the process's stdout: from now on only the returned stream writes to it, and whatever else is
    printed goes to stderr.

    DeepSpeed and the compilers that it starts log on stdout, so the file descriptor is redirected, not only
    sys.stdout. Call it before any import that keeps a reference to stdout, and on every rank, since launchers
    merge the ranks' outputs.
    """
    sys.stdout.flush()
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


class JsonLines:
    """Writes JSON objects to a stream, one a line.

    A reader that closes the pipe (`| head -1`) ends the output, not the run; `rounds.jsonl` is complete.
    """

    def __init__(self, stream: TextIO):
        self._stream: TextIO | None = stream

    def write(self, event: str, values: dict[str, Any]) -> None:
        """Write one object with the name of the event."""
        if self._stream is None:
            return
        try:
            self._stream.write(json.dumps({"event": event, **values}, allow_nan=False) + "\n")
            self._stream.flush()
        except BrokenPipeError:
            broken = self._stream
            self._stream = None
            # Closing flushes once more. Left to the interpreter's exit, the error would change the exit code.
            with suppress(BrokenPipeError):
                broken.close()


def write_refusal(stream: TextIO, error: FedSpeedError) -> None:
    """Write the refusal of a run to the stream of `--json`: the message on stderr and the exit code."""
    JsonLines(stream).write("error", {"error": str(error), "exit_code": error.exit_code})
    error.printed_as_json = True


class NoJson:
    """The output of a run without `--json`: nothing."""

    def write(self, event: str, values: dict[str, Any]) -> None:
        """Ignore an object."""
