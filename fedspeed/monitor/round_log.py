"""`rounds.jsonl`: the records of a run, one line of strict JSON per round."""

import json
import os
from pathlib import Path

from fedspeed.errors import JournalError
from fedspeed.files import json_value, write_atomically
from fedspeed.monitor.records import RoundRecord


class RoundLog:
    """The file of a run's records, which survives a restart.

    Opening it keeps the rounds up to `resume_round`. Later rounds are dropped, because they will be trained
    again, and so is a last line without a newline, because a crash has cut it off. `resume_round=0` is a
    fresh start and drops everything.
    """

    def __init__(self, path: Path, resume_round: int = 0):
        self._path = Path(path)
        kept = [record for record in read_rounds(self._path) if resume_round and record.round <= resume_round]
        write_atomically(self._path, b"".join(_line(record) for record in kept))

    def append(self, record: RoundRecord) -> None:
        """Append one round. It is on disk when this returns."""
        with open(self._path, "ab") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> tuple[RoundRecord, ...]:
        """Return the records of all rounds in the file."""
        return read_rounds(self._path)


def read_rounds(path: Path) -> tuple[RoundRecord, ...]:
    """Return all complete rounds of a log in order; none if there is no log.

    Raises:
        JournalError: a line that ends with a newline is no record.
    """
    if not path.exists():
        return ()
    lines = path.read_bytes().split(b"\n")[:-1]  # the text after the last newline is empty, or cut off
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
