"""Traces: the spans of a rank's work, in the format of Perfetto (https://ui.perfetto.dev) and
chrome://tracing.

They are written on the rank's own host. Times are those of the host's monotonic clock, so that the ranks of a
host have a common time axis.
"""

import json
from pathlib import Path
from typing import Any

from fedspeed.files import write_atomically

FOLDER = "trace"
Span = tuple[str, str, float, float]  # kind, name, begin [s], end [s]
MAX_SPANS = 200_000  # of a rank; later spans are dropped
# Kinds of spans. A `stage` (monitor.clock) encloses others.
KINDS = ("compute", "load", "step", "wait", "send", "exchange", "stage")
_LANES = {"send": 1, "exchange": 2}  # rows of their own, since they overlap with the rank's computation


class NoTrace:
    """The trace of a rank that is not traced: it records nothing."""

    on = False

    def round(self, number: int) -> None:
        """Ignore the beginning of a round."""

    def span(self, kind: str, name: str, begin: float, end: float) -> None:
        """Ignore a span."""

    def close(self) -> None:
        """Do nothing."""


class Trace(NoTrace):
    """Records the spans of a rank and writes them to a file.

    Args:
        folder: of the run, on this host.
        rank: world rank.
        rounds: number of rounds to trace, from the first one of this start.
    """

    def __init__(self, folder: Path, rank: int, rounds: int):
        self._path = folder / FOLDER / f"rank-{rank}.json"
        self._rank = rank
        self._left = rounds
        self._spans: list[Span] = []
        self.on = False

    def round(self, number: int) -> None:
        """Begin a round; write the file after the last traced one."""
        if self._left == 0 and self.on:
            self._write()
        self.on = self._left > 0
        self._left = max(0, self._left - 1)

    def span(self, kind: str, name: str, begin: float, end: float) -> None:
        """Record work from `begin` to `end`, in seconds of time.perf_counter."""
        if self.on and len(self._spans) < MAX_SPANS:
            self._spans.append((kind, name, begin, end))

    def close(self) -> None:
        """Write the file if rounds are still being traced."""
        if self.on:
            self._write()
        self.on = False

    def _write(self) -> None:
        events: list[dict[str, Any]] = [
            {
                "name": "process_name",
                "ph": "M",
                "pid": self._rank,
                "tid": 0,
                "args": {"name": f"rank {self._rank}"},
            }
        ]
        events += [
            {
                "name": name,
                "cat": kind,
                "ph": "X",
                "ts": round(1e6 * begin, 1),
                "dur": round(1e6 * (end - begin), 1),
                "pid": self._rank,
                "tid": _LANES.get(kind, 0),
            }
            for kind, name, begin, end in self._spans
        ]
        write_atomically(self._path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode())


def read_spans(folder: Path) -> dict[int, list[Span]]:
    """Read the traces in a run's folder.

    Returns:
        By rank, (kind, name, begin, end), in seconds since the first span of all ranks. Files that are
        damaged or of another kind are left out.
    """
    found: dict[int, list[Span]] = {}
    for path in sorted((folder / FOLDER).glob("rank-*.json")):
        try:
            events = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
            found[int(path.stem.partition("-")[2])] = [
                (e["cat"], e["name"], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in events
            ]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    first = min((span[2] for spans in found.values() for span in spans), default=0.0)
    return {
        rank: [(kind, name, begin - first, end - first) for kind, name, begin, end in spans]
        for rank, spans in sorted(found.items())
    }
