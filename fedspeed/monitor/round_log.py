"""`rounds.jsonl`: the records of a run, one line of strict JSON per round."""

import json
import os
from pathlib import Path

from fedspeed.errors import JournalError
from fedspeed.files import json_value, write_atomically
from fedspeed.monitor.records import RoundRecord


class RoundLog:
    """Appends rounds to a file and gives them back after a restart.

    Opening it keeps the rounds up to `resume_round` and drops the rest: later ones will be trained again, and
    a last line without its newline is one that a crash cut off. `resume_round=0` is a fresh start and drops
    everything.
    """

    def __init__(self, path: Path, resume_round: int = 0):
        self._path = Path(path)
        kept = [record for record in read_rounds(self._path) if resume_round and record.round <= resume_round]
        write_atomically(self._path, b"".join(_line(record) for record in kept))

    def append(self, record: RoundRecord) -> None:
        """Add one round; it is on disk when this returns."""
        with open(self._path, "ab") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> tuple[RoundRecord, ...]:
        return read_rounds(self._path)


def read_rounds(path: Path) -> tuple[RoundRecord, ...]:
    """All complete rounds in a log, in order; none if there is no log. Raises JournalError for a line in the
    middle that is no record.
    """
    if not path.exists():
        return ()
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is empty, or cut off
    return tuple(_parse(path, number, line) for number, line in enumerate(lines, 1))


def _parse(path: Path, number: int, line: bytes) -> RoundRecord:
    try:
        return RoundRecord.from_json(json_value(line))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise JournalError(
            f"{path}, line {number}: not the record of a round ({error}). The file only feeds the report: "
            "move it away and start again, and the rounds so far are missing from the report, but not from "
            "the run"
        ) from error


def _line(record: RoundRecord) -> bytes:
    return json.dumps(record.to_json(), allow_nan=False).encode() + b"\n"
