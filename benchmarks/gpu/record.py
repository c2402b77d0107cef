"""What a phase has found so far, in a file that is whole at every moment."""

import json
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

from fedspeed.files import write_atomically


class LeftOut(Exception):
    """Says why something was not measured. That is a result, and no failure."""


class Record:
    """Keeps the results of one phase by name, and writes all of them with each new one.

    Args:
        folder: where `<phase>.json` is written.
        limit_s: seconds after which the phase is killed.
        about: facts that stand above the results, such as the name of the card.
    """

    def __init__(self, folder: Path, phase: str, limit_s: float, about: dict | None = None):
        self.path = folder / f"{phase}.json"
        self.phase = phase
        self.results: dict = {}
        self._about = dict(about or {})
        self._limit_s = limit_s
        self._begin = time.monotonic()
        self._write("running")

    @property
    def seconds(self) -> float:
        """Since the phase began."""
        return time.monotonic() - self._begin

    @property
    def left_s(self) -> float:
        """Until the phase is killed."""
        return self._limit_s - self.seconds

    def describe(self, **facts) -> None:
        """Add facts that stand above the results."""
        self._about |= facts
        self._write("running")

    def note(self, name: str, value) -> None:
        """Keep a result, print it and write the file anew."""
        self.results[name] = value
        print(f"[{self.seconds:6.1f} s] {self.phase}: {name}: {json.dumps(value)}", flush=True)
        self._write("running")

    @contextmanager
    def guarded(self, name: str):
        """Make a result of whatever goes wrong inside, so that the phase goes on with the next thing."""
        try:
            yield
        except LeftOut as why:
            self.note(name, {"left out": str(why)})
        except Exception as error:  # a failure is a result, too
            where = traceback.format_exc(limit=-4)
            self.note(name, {"failed": f"{type(error).__name__}: {error}"[:600], "where": where[-1500:]})

    def need(self, seconds: float) -> None:
        """Ask for time to measure something.

        Raises:
            LeftOut: the phase will be killed before.
        """
        if self.left_s < seconds:
            raise LeftOut(
                f"{self.left_s:.0f} s of {self._limit_s:.0f} were left, and it takes about {seconds:.0f}"
            )

    def finish(self) -> None:
        """Write the last word of the phase: finished, or failed where one of its results is a failure."""
        self._write("failed" if has_failed(self.results) else "finished")

    def _write(self, status: str) -> None:
        content = {"phase": self.phase, "status": status, "seconds": round(self.seconds, 1)}
        content |= {"about": self._about, "results": self.results}
        write_atomically(self.path, json.dumps(content, indent=1).encode())


def has_failed(results: dict) -> bool:
    """Whether one of a phase's results is a failure."""
    return any(isinstance(value, dict) and "failed" in value for value in results.values())


def has_ended(path: Path) -> bool:
    """Whether a phase has said how it ended."""
    return path.is_file() and json.loads(path.read_text())["status"] != "running"


def end_as(path: Path, phase: str, status: str) -> None:
    """Write how a phase has ended that could not say so itself."""
    content = {"phase": phase, "status": status, "seconds": None, "about": {}, "results": {}}
    if path.is_file():
        content = json.loads(path.read_text()) | {"status": status}
    write_atomically(path, json.dumps(content, indent=1).encode())
