"""Runs one after the other: a line for each, and a file from which an interrupted command goes on."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedspeed.files import write_atomically

Run = dict[str, Any]


class Progress:
    """What has been run.

    Args:
        path: of the file. key: of what is run; what was kept under another key is
            dropped. whole: number of runs.
    """

    def __init__(self, path: Path, key: str, whole: int):
        self._path = path
        self._key = key
        self._whole = whole
        self._done = 0
        self._measured = 0
        self._begin = time.monotonic()
        self._kept = self._read()

    def _read(self) -> dict[str, Run]:
        try:
            kept = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return kept["runs"] if kept.get("key") == self._key else {}

    def run(self, name: str, repetition: int, measure: Callable[[], Run]) -> Run:
        """Return a run that is kept, or measure it; one that has failed is not kept."""
        label = f"{name} #{repetition + 1}"
        self._done += 1
        if label in self._kept:
            print(f"[{self._done}/{self._whole}] {label}: was measured before", flush=True)
            return self._kept[label]
        found = measure()
        self._measured += 1
        if "failed" not in found:
            self._kept[label] = found
            content = json.dumps({"key": self._key, "runs": self._kept}).encode()
            write_atomically(self._path, content)
        elapsed = time.monotonic() - self._begin
        left = elapsed / self._measured * (self._whole - self._done)
        print(
            f"[{self._done}/{self._whole}] {label}: {outcome(found)}; {elapsed:.0f} s so far, "
            f"about {left:.0f} s left",
            flush=True,
        )
        return found

    def forget(self) -> None:
        """Remove the file: the next command measures everything anew."""
        self._path.unlink(missing_ok=True)


def outcome(run: Run) -> str:
    """Return a run's line: its seconds and last loss, or why it failed."""
    if "failed" in run:
        return f"failed: {run['failed']}"
    seconds = sum(run["rounds_s"]) / len(run["rounds_s"])
    return (
        f"first aggregate {run['first_aggregate_s']:.1f} s, {seconds:.2f} s a round, "
        f"RSS {run['rss_mb']:.0f} MB, loss {run['losses'][-1]:.6f}"
    )
