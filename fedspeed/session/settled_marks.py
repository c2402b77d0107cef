"""The settled marks of a site, in a file of its run: they survive `kill -9` and the loss of power.

A line of JSON for each mark. A line that is not complete is of a mark whose writing was interrupted; nothing
had left the site for it.
"""

import json
import os
from pathlib import Path

from fedspeed.errors import JournalError
from fedspeed.files import json_value
from fedspeed.routing.anonymous.settlement import Mark

NAME = "settled-sums.jsonl"  # in a run's folder


class FileMarks:
    """A `routing.anonymous.settlement.SettledMarks` in the folder of a run."""

    def __init__(self, folder: Path):
        """Read the marks that earlier starts have written.

        Raises:
            JournalError: the file cannot be read as marks.
        """
        self._path = folder / NAME
        self._marks: dict[str, Mark] = {}
        try:
            text = self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise JournalError(self._problem(str(error))) from error
        complete = text[: text.rfind("\n") + 1]
        for number, line in enumerate(complete.split("\n")[:-1], 1):
            self._read_line(number, line)
        if complete != text:
            self._rewrite(complete)

    def _read_line(self, number: int, line: str) -> None:
        try:
            values = json_value(line)
            assert isinstance(values, dict), "not an object"
            mark = Mark(bytes.fromhex(values["members"]), bytes.fromhex(values["vector"]))
            self._marks[str(values["label"])] = mark
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise JournalError(self._problem(f"line {number}: {error}")) from error

    def _problem(self, reason: str) -> str:
        return (
            f"{self._path}: cannot be read as the list of sums that this site has taken part in ({reason}). "
            "Without it a round might be summed twice over different sites; restore it, or start anew with "
            "--fresh on all sites and another run.seed"
        )

    def _rewrite(self, complete: str) -> None:
        """Drop an incomplete last line, so that the next one does not continue it."""
        with open(self._path, "r+b") as file:
            file.truncate(len(complete.encode()))
            os.fsync(file.fileno())

    def get(self, label: str) -> Mark | None:
        """Return the mark of a label; None if there is none."""
        return self._marks.get(label)

    def put(self, label: str, mark: Mark) -> None:
        """Append a mark; it is on disk when this returns. A mark that is known already is not written again.

        Raises:
            JournalError: the file cannot be written.
        """
        if self._marks.get(label) == mark:
            return
        line = json.dumps({"label": label, "members": mark.members.hex(), "vector": mark.vector.hex()})
        try:
            self._append(line.encode() + b"\n")
        except OSError as error:
            raise JournalError(
                f"{self._path}: cannot be written ({error.strerror}), so this site leaves the sum; "
                "free some space or mend its permissions: the same command goes on from the journal"
            ) from error
        self._marks[label] = mark

    def _append(self, line: bytes) -> None:
        is_new = not self._path.exists()
        with open(self._path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if is_new:  # the name itself must survive too
            folder = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
