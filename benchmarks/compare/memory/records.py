"""What the memory part keeps: runs of one step by model; memory.json holds these, and is checked."""

import time
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from benchmarks.compare.measured.records import Record, Run, refused
from benchmarks.compare.results import machine


class Size(Record):
    """A model, and the run of each arm's one step on it."""

    blocks: int
    hidden: int
    parameters: int
    runs: tuple[Run, ...] = ()

    def device_bytes(self, arm: str) -> int | None:
        """Return the peak of an arm; None: it was not measured."""
        return next((run.device_bytes for run in self.runs if run.arm == arm), None)


class Memory(Record):
    """All sizes, with the titles of the arms (the reference first), the tokens of a step, and the cap."""

    date: str
    machine: dict[str, str | int | float | list[str] | None]
    titles: dict[str, str]
    tokens: int
    cap_gib: float
    sizes: tuple[Size, ...]

    @classmethod
    def now(cls, sizes: tuple[Size, ...], titles: Mapping[str, str], tokens: int, cap_gib: float) -> "Memory":
        """Return them with the day and the machine."""
        date = time.strftime("%Y-%m-%d")
        return cls(
            date=date, machine=machine(), titles=dict(titles), tokens=tokens, cap_gib=cap_gib, sizes=sizes
        )


def read(path: Path) -> Memory:
    """Read a memory.json.

    Raises:
        DataError: it is not one.
    """
    try:
        return Memory.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise refused(path, error) from error
