"""One run of `launch.py`, measured."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.compare.measured.arms import Arm
from benchmarks.compare.measured.records import CAUSES, Point, Run
from benchmarks.compare.processes import Watched, watch
from benchmarks.compare.results import ROOT

LIMIT_S = 4 * 3600.0
EVAL_LIMIT_S = 3600.0
DRY_RUN_LIMIT_S = 300.0
MEMORY = "memory "  # begins the line of a dry run


def measure(
    arm: Arm, seed: int, *, config: Path, arguments: Sequence[str], folder: Path, evaluates: bool = True
) -> Run:
    """Run one arm with one seed from the start, and return what was measured. A run that ends otherwise than
    with exit code 0 has failed, for a reason that tells also what the program says it needs.

    Args:
        config: the YAML file. arguments: after it. folder: of the run's own folder. evaluates:
            whether the exported model of an arm with an emulator is evaluated.
    """
    name = f"{arm.name}-{seed}"
    places = (f"run.out={folder}", f"run.name={name}", "monitor.progress=false", "monitor.tensorboard=false")
    command = [sys.executable, str(ROOT / "launch.py"), "--config", str(config), "--fresh"]
    watched = watch(
        [*command, "--json", *arguments, *places], cwd=Path.cwd(), env=environment(), limit_s=LIMIT_S
    )
    run = Run(arm=arm.name, seed=seed, arguments=tuple(arguments), status="failed")
    if watched.code != 0:
        need = needed([*command, "--dry-run", *arguments, *places])
        return run.model_copy(update={"reason": f"{reason_of(watched)}{need}"})
    done = finished(run, watched)
    if not (arm.emulator and evaluates):
        return done
    try:
        return done.model_copy(update={"exported_loss": evaluated(folder / name)})
    except (subprocess.SubprocessError, ValueError) as error:
        return run.model_copy(update={"reason": f"its export could not be evaluated: {error}"})


def needed(command: Sequence[str]) -> str:
    """Return what a dry run says about device memory, as a further sentence; empty where it says nothing."""
    try:
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, check=True, timeout=DRY_RUN_LIMIT_S
        )
    except subprocess.SubprocessError:
        return ""
    lines = [
        line.removeprefix(MEMORY).strip() for line in done.stdout.splitlines() if line.startswith(MEMORY)
    ]
    return "".join(f". A step needs {line}" for line in lines)


def environment() -> dict[str, str]:
    """Return the environment of a run. On a machine without a GPU torch computes on the CPU; ranks divide
    its cores among themselves.
    """
    return {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **os.environ}


def reason_of(watched: Watched) -> str:
    """Return why a command failed: the last line of its errors, or its limit."""
    if watched.code is None:
        return f"killed after {watched.seconds:.0f} s"
    lines = [line.strip() for line in watched.errors.splitlines() if line.strip()]
    return f"exit code {watched.code}: {lines[-1] if lines else 'it said nothing'}"


def finished(run: Run, watched: Watched) -> Run:
    """Fill in what a run printed with `--json`, and what was seen of its processes.

    Args:
        watched: its lines; those that are no round's are skipped.
    """
    seen = [(at, json.loads(line)) for at, line in watched.lines if line.startswith("{")]
    rounds = [(at, record) for at, record in seen if record["event"] == "round"]
    curve = []
    seconds = 0.0
    tokens = 0
    for _, record in rounds:
        seconds += record["seconds"] if record["round"] else 0.0
        tokens += record["tokens"] or 0
        curve.append(
            Point(
                round=record["round"],
                seconds=seconds,
                tokens=tokens,
                loss=_number(record["val_loss"]),
                exact=_number(record["val_exact"]),
            )
        )
    trained = [(at, record) for at, record in rounds if record["round"]]
    steady = [record for _, record in trained[1:]] or [record for _, record in trained]
    round_s = statistics.median(record["seconds"] for record in steady)
    causes = {cause: statistics.median(record[f"{cause}_s"] for record in steady) for cause in CAUSES}
    steps = [record["step_s"] for record in steady if record["step_s"] is not None]
    peaks = [client["device_bytes"] or 0 for _, record in trained for client in record["per_client"]]
    clients = max(1, max(record["clients"] or 1 for record in steady))
    return run.model_copy(
        update={
            "status": "finished",
            "curve": tuple(curve),
            "start_s": rounds[0][0],
            "first_aggregate_s": trained[0][0],
            "round_s": round_s,
            "causes": {**causes, "other": max(0.0, round_s - sum(causes.values()))},
            "step_s": statistics.median(steps) if steps else None,
            "device_bytes": max(peaks, default=0) or None,
            "host_rss": watched.rss,
            "host_pss": watched.pss,
            "sent": statistics.fmean(record["bytes_sent"] for record in steady) / clients,
        }
    )


def _number(value: float | str | None) -> float | None:
    """Return a number of a record, which writes one that is not finite as a text."""
    return None if value is None else float(value)


def evaluated(run: Path) -> float:
    """Return the held-out loss of what a run has exported, in the whole base, by `fedspeed eval`."""
    command = [sys.executable, "-m", "fedspeed", "eval", str(run), "--json"]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=True, timeout=EVAL_LIMIT_S
    )
    (line,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return float(line["metrics"]["loss"]["score"])
