"""Rows of the table, and what makes a result valid."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.compare.outside.task import ROUNDS, TASKS

TOLERANCE = 1e-5  # of a held-out loss in fp32
NUMBERS = ("first_aggregate_s", "total_s", "rss_mb", "pss_mb")
Values = Mapping[str, Any]


def whole_runs(row: Values) -> list[Values]:
    """Return the runs of a row that have not failed."""
    return [run for run in row["runs"] if "failed" not in run]


def round_seconds(runs: Sequence[Values]) -> list[float]:
    """Return the seconds of every round after the first, of all runs."""
    return [seconds for run in runs for seconds in run["rounds_s"]]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, least and most of some values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def judged(row: Values, reference: Values | None) -> dict[str, Any]:
    """Return a row with what its runs come to.

    Adds medians, the `largest_difference` of a held-out loss from the reference's, and a `verdict`: equal,
    wrong (a loss differs by more than TOLERANCE), failed (no whole run, or a failed one) or not compared (the
    reference itself has failed).

    Args:
        reference: the row of the plain loop on the same task.
    """
    runs = whole_runs(row)
    found: dict[str, Any] = dict(row)
    if runs:
        found["round_s"] = spread(round_seconds(runs))
        found |= {key: spread([run[key] for run in runs]) for key in NUMBERS}
        sent = [run["loopback_mb"] for run in runs if run["loopback_mb"] is not None]
        found["loopback_mb"] = spread(sent) if sent else None
    expected = whole_runs(reference) if reference else []
    difference = largest_difference(runs, expected[0]["losses"]) if runs and expected else None
    found["largest_difference"] = difference
    found["verdict"] = verdict(len(runs) == len(row["runs"]) > 0, difference)
    return found


def largest_difference(runs: Sequence[Values], losses: Sequence[float]) -> float:
    """Return the largest difference of a held-out loss, over rounds and runs."""
    return max(abs(a - b) for run in runs for a, b in zip(run["losses"], losses, strict=True))


def verdict(is_whole: bool, difference: float | None) -> str:
    """Say whether a row counts; see `judged`."""
    if difference is not None and not difference <= TOLERANCE:
        return "wrong"
    if not is_whole:
        return "failed"
    return "not compared" if difference is None else "equal"


def problems(values: Values) -> list[str]:
    """Return what is wrong with the form of a result, by its place; empty: it is valid."""
    found = []
    for key, kind in (("task", dict), ("repeat", int), ("rows", list), ("left_out", list)):
        if not isinstance(values.get(key), kind):
            found.append(f"{key}: not {kind.__name__}")
    if found:
        return found
    for at, row in enumerate(values["rows"]):
        found += [f"rows[{at}]: {problem}" for problem in _row_problems(row)]
    for at, entry in enumerate(values["left_out"]):
        if missing := {"system", "reason", "elsewhere"} - set(entry):
            found.append(f"left_out[{at}]: without {', '.join(sorted(missing))}")
    return found


def _row_problems(row: Values) -> list[str]:
    needed = {"name", "system", "task", "version", "packages", "install_s", "runs", "verdict"}
    if missing := needed - set(row):
        return [f"without {', '.join(sorted(missing))}"]
    found = [] if row["task"] in TASKS else [f"task {row['task']!r}"]
    for at, run in enumerate(row["runs"]):
        if "failed" in run:
            continue
        if len(run["losses"]) != ROUNDS or len(run["rounds_s"]) != ROUNDS - 1:
            found.append(f"runs[{at}]: not {ROUNDS} rounds")
        if not all(run[key] > 0 for key in NUMBERS):
            found.append(f"runs[{at}]: a measure is not positive")
    if row["verdict"] == "equal" and not 0 <= row["largest_difference"] <= TOLERANCE:
        found.append("equal, but its losses differ")
    return found
