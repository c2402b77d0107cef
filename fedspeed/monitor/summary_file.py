"""`summary.json`: the result of a run for programs. It is the last file that a run writes."""

import json
from pathlib import Path

from fedspeed.errors import JournalError
from fedspeed.files import json_value, write_atomically
from fedspeed.monitor.records import Summary

NAME = "summary.json"


def write_summary(folder: Path, summary: Summary) -> None:
    """Write a summary, reduced to what outputs may show (`visible`), into the folder of a run."""
    write_atomically(folder / NAME, json.dumps(summary.to_json(), allow_nan=False, indent=1).encode() + b"\n")


def read_summary(folder: Path) -> Summary | None:
    """Return the summary in the folder of a run, or None if the run has not ended yet.

    Raises:
        JournalError: the file is no summary.
    """
    path = folder / NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return Summary.from_json(json_value(content))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise JournalError(
            f"{path}: not the summary of a run ({error}). Move it away and start again: "
            "the run goes on from its journal, and writes it anew when it ends"
        ) from error
