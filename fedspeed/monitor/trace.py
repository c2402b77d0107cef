"""What a rank did when: spans in the form that Perfetto (https://ui.perfetto.dev) and chrome://tracing show,
kept on the rank's own host.

Times are of the host's monotonic clock, so that ranks of one host lie on one axis.
"""

import json
from pathlib import Path

from fedspeed.files import write_atomically

FOLDER = "trace"
MAX_SPANS = 200_000  # of a rank; then it stops
# Kinds of spans. `stage` surrounds others: what the round's seconds are charged to.
KINDS = ("compute", "load", "step", "wait", "send", "exchange", "stage")
_LANES = {"send": 1, "exchange": 2}  # beside what the rank's own thread does


class NoTrace:
    """Keeps nothing."""

    on = False

    def round(self, number: int) -> None:
        pass

    def span(self, kind: str, name: str, begin: float, end: float) -> None:
        pass

    def close(self) -> None:
        pass


class Trace(NoTrace):
    """Args:
    folder: of the run, on this host. rank: world rank. rounds: how many rounds are traced, from the first
        that this start trains.
    """

    def __init__(self, folder: Path, rank: int, rounds: int):
        self._path = folder / FOLDER / f"rank-{rank}.json"
        self._rank = rank
        self._left = rounds
        self._spans: list[tuple[str, str, float, float]] = []
        self.on = False

    def round(self, number: int) -> None:
        """A round begins."""
        if self._left == 0 and self.on:
            self._write()
        self.on = self._left > 0
        self._left = max(0, self._left - 1)

    def span(self, kind: str, name: str, begin: float, end: float) -> None:
        """Something was done from `begin` to `end`, in seconds of time.perf_counter."""
        if self.on and len(self._spans) < MAX_SPANS:
            self._spans.append((kind, name, begin, end))

    def close(self) -> None:
        if self.on:
            self._write()
        self.on = False

    def _write(self) -> None:
        events = [
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


def read_spans(folder: Path) -> dict[int, list[tuple[str, str, float, float]]]:
    """(kind, name, begin, end) of the ranks that have left a trace in a run's folder, in seconds from the
    first of all.
    """
    found = {}
    for path in sorted((folder / FOLDER).glob("rank-*.json")):
        try:
            events = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
            found[int(path.stem.partition("-")[2])] = [
                (e["cat"], e["name"], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in events
            ]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another one's, or half of one: a picture is made of what there is
    first = min((span[2] for spans in found.values() for span in spans), default=0.0)
    return {
        rank: [(kind, name, begin - first, end - first) for kind, name, begin, end in spans]
        for rank, spans in sorted(found.items())
    }
