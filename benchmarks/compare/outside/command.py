"""What `fedspeed bench outside` does, in order; it prints a line for each environment and run."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

from benchmarks.compare.outside import SCRATCH
from benchmarks.compare.outside.environments import Environment, InstallError, interpreter, key_of, make
from benchmarks.compare.outside.measuring import measure
from benchmarks.compare.outside.network import Network
from benchmarks.compare.outside.page import draw, page, text_table
from benchmarks.compare.outside.progress import Progress
from benchmarks.compare.outside.rows import TOLERANCE, judged, problems
from benchmarks.compare.outside.system import System, Variant
from benchmarks.compare.outside.systems import chosen
from benchmarks.compare.outside.task import ROOT, settings
from benchmarks.compare.results import keep, save

PREPARE_S = 600.0


def compare(arguments: argparse.Namespace) -> int:
    """Write outside.json after every run, then the page and the plot from it; return the exit code."""
    path = arguments.out / "outside.json"
    values = run_all(chosen(arguments.systems), arguments.repeat, limit_s=arguments.limit, path=path)
    path.with_suffix(".md").write_text(page(json.loads(path.read_text())))
    draw(values, path.with_suffix(".png"))
    keep(path, arguments.keep)
    print(text_table(values["rows"]))
    return exit_code(values)


def exit_code(values: dict[str, Any]) -> int:
    """Return 0 if everything ran and all losses are equal, and say what is wrong otherwise."""
    wrong = [row["name"] for row in values["rows"] if row["verdict"] != "equal"]
    failed = [entry["system"] for entry in values["left_out"] if not entry["elsewhere"]]
    for name in wrong:
        verdict = next(row["verdict"] for row in values["rows"] if row["name"] == name)
        print(f"{name}: {verdict}")
    for name in failed:
        print(f"{name}: not installed")
    return 1 if wrong or failed else 0


def run_all(systems: Sequence[System], repeat: int, *, limit_s: float, path: Path) -> dict[str, Any]:
    """Run every variant in each repetition, and return the values of the result.

    Args:
        path: of the JSON, which is written after every run. What an interrupted command has measured is
            taken from SCRATCH.
    """
    made, left_out = environments(systems)
    found: list[dict[str, Any]] = []
    wanted: list[tuple[Variant, Path]] = []
    for system in made:
        for variant in system.variants:
            found.append(_empty_row(system, variant, made[system]))
            wanted.append((variant, _python(system)))
    progress = Progress(SCRATCH / "outside" / "runs.json", _key(made), repeat * len(found))
    values: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fsb-") as temporary:  # short: sockets lie below it
        folder = Path(temporary)
        _prepare(folder)
        for repetition in range(repeat):
            for row, (variant, python) in zip(found, wanted, strict=True):
                row["runs"].append(
                    progress.run(variant.name, repetition, lambda: measure(variant, python, folder, limit_s))
                )
                values = _values(found, left_out, repeat)
                save(path, values)
    assert not (wrong := problems(values)), wrong
    progress.forget()
    return values


def environments(systems: Sequence[System]) -> tuple[dict[System, Environment], list[dict[str, Any]]]:
    """Make what the systems need; return those that can run here, and the others with the reason."""
    made = {}
    left_out: list[dict[str, Any]] = []
    for system in systems:
        try:
            own = _environment(system)
        except InstallError as error:
            print(error, flush=True)
            left_out.append({"system": system.name, "reason": str(error), "elsewhere": ""})
            continue
        if system.refusal is not None:
            reason = system.refusal(_python(system))
            about = {"version": own.version, "packages": own.packages, "install_s": own.seconds}
            left_out.append({"system": system.name, "reason": reason, "elsewhere": system.elsewhere, **about})
            print(f"{system.name}: {reason}", flush=True)
        else:
            made[system] = own
    return made, left_out


def _environment(system: System) -> Environment:
    if not system.installs:
        return Environment("", 0.0, len(list(distributions())), version(system.package))
    folder = SCRATCH / "envs" / system.environment
    print(f"environment {system.environment}", end=" ", flush=True)
    begin = time.monotonic()
    found = make(folder, system.package, system.installs)
    print(f"{found.version}, {found.packages} packages, {time.monotonic() - begin:.0f} s", flush=True)
    return found


def _python(system: System) -> Path:
    if not system.installs:
        return Path(sys.executable)
    return interpreter(SCRATCH / "envs" / system.environment)


def _key(made: dict[System, Environment]) -> str:
    return key_of([[json.dumps(settings())], *([system.name, own.key] for system, own in made.items())])


def _empty_row(system: System, variant: Variant, own: Environment) -> dict[str, Any]:
    return {
        "name": variant.name,
        "system": system.name,
        "task": variant.task,
        "reference": variant.reference,
        "package": system.package,
        "version": own.version,
        "packages": own.packages,
        "install_s": own.seconds if system.installs else None,
        "runs": [],
    }


def _prepare(folder: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "benchmarks.compare.outside.task", "prepare", str(folder)],
        check=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"},
        timeout=PREPARE_S,
        stderr=subprocess.DEVNULL,
    )


def _values(found: Sequence[dict[str, Any]], left_out: list[dict[str, Any]], repeat: int) -> dict[str, Any]:
    with Network() as network:
        isolated = network.isolated
    references = {row["task"]: row for row in found if row["reference"]}
    return {
        "kind": "measured on this machine, all systems in turn in each repetition",
        "task": settings(),
        "repeat": repeat,
        "tolerance": TOLERANCE,
        "isolated": isolated,
        "rows": [judged(row, references.get(row["task"])) for row in found if row["runs"]],
        "left_out": left_out,
    }
