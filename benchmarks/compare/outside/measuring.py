"""One run of one variant: what it took, or why it failed."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.compare.outside.network import Network
from benchmarks.compare.outside.system import Site, Variant
from benchmarks.compare.outside.task import ROOT, ROUNDS
from benchmarks.compare.processes import Watched, watch

LIMIT_S = 600.0
MIB = 2**20


def measure(variant: Variant, python: Path, folder: Path, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """Run a variant once.

    Args:
        folder: the task's files, with a path short enough for names of sockets below it.

    Returns:
        first_aggregate_s, rounds_s (those after the first), total_s, rss_mb, pss_mb, loopback_mb (None: not
        counted) and losses; or failed: the reason.
    """
    scratch = Path(tempfile.mkdtemp(prefix="r", dir=folder))
    try:
        command = variant.command(Site(python, folder, scratch))
        with Network() as network:
            watched = watch(
                network.inside(command),
                cwd=ROOT,
                env=environment(os.environ, variant.variables, python, scratch),
                limit_s=limit_s,
                find=network.processes,
            )
            sent = network.loopback_bytes()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    times, losses = rounds_of(watched.lines)
    if reason := failure(watched, len(times), limit_s):
        return {"failed": reason}
    return {
        "first_aggregate_s": round(times[0], 3),
        "rounds_s": [round(b - a, 3) for a, b in zip(times, times[1:])],
        "total_s": round(watched.seconds, 3),
        "rss_mb": round(watched.rss / MIB, 1),
        "pss_mb": round(watched.pss / MIB, 1),
        "loopback_mb": None if sent is None else round(sent / MIB, 3),
        "losses": losses,
    }


def environment(
    outer: Mapping[str, str], own: Mapping[str, str], python: Path, scratch: Path
) -> dict[str, str]:
    """Return the variables of a run: our code and the system's programs are found, nothing is asked of the
    network, and what libraries write lies in the run's folder.
    """
    kept = {key: value for key, value in outer.items() if key not in {"OMP_NUM_THREADS", "PYTHONHOME"}}
    return {
        **kept,
        "PATH": f"{python.parent}{os.pathsep}{outer.get('PATH', os.defpath)}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
        "RAY_TMPDIR": str(scratch),
        "FLWR_HOME": str(scratch / "flwr"),
        **own,
    }


def rounds_of(lines: Iterable[tuple[float, str]]) -> tuple[list[float], list[float]]:
    """Return the seconds at which the rounds were over and their losses, up to the first that is missing.

    Args:
        lines: seconds and text of everything that was printed.
    """
    found: dict[int, tuple[float, float]] = {}
    for seconds, line in lines:
        event = _event(line)
        if event.get("event") == "round":
            found.setdefault(event["round"], (seconds, event["val_loss"]))
    whole = []
    while len(whole) + 1 in found:
        whole.append(found[len(whole) + 1])
    return [seconds for seconds, _ in whole], [loss for _, loss in whole]


def _event(line: str) -> dict[str, Any]:
    start = line.find("{")  # a log may put its own words before it
    try:
        event = json.loads(line[start:]) if start >= 0 else {}
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def failure(watched: Watched, rounds: int, limit_s: float) -> str:
    """Return why a run does not count; empty: it does."""
    if watched.code is None:
        reason = f"did not end within {limit_s:.0f} s, and was killed"
    elif watched.code:
        reason = f"ended with exit code {watched.code}"
    elif rounds < ROUNDS:
        reason = "ended without error"
    else:
        return ""
    tail = " | ".join(watched.errors.strip().splitlines()[-3:])
    return f"{reason} after {rounds} of {ROUNDS} rounds: {tail}"
