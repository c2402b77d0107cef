"""Measure the causes, and write the results. Each is saved when it has been measured."""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.compare.causes import engines, report, timed
from benchmarks.compare.causes.ratios import difference, equal_to, ratio
from benchmarks.compare.results import keep, save
from fedspeed.errors import ConfigError

LEAST = 3  # pairs of a ratio


@dataclass(frozen=True)
class Cause:
    """What one part of FedSpeed contributes to.

    Attributes:
        of: which promised ratio it is a part of. on, off: what is compared.
        measure: given (pairs, quick), returns seconds and losses by variant.
        unit: what takes the seconds. losses: what is known of them where none are measured.
        hosts: whether it needs the virtual cluster.
    """

    of: str
    on: str
    off: str
    measure: Callable[[int, bool], dict[str, Any]]
    unit: str = "a step"
    losses: str = ""
    hosts: bool = False


def _engine(name: str) -> Callable[[int, bool], dict[str, Any]]:
    return lambda repeat, quick: engines.measure(name, repeat, quick)


CAUSES = {
    "loads": Cause(
        "throughput",
        "base on NVMe: one pass over it for all micro-batches of a step",
        "each micro-batch loads the base itself",
        _engine("loads"),
    ),
    "clients": Cause(
        "throughput",
        "base on NVMe: four clients of a rank share each load",
        "one client after the other",
        _engine("clients"),
        unit="two steps of all clients",
    ),
    "answers": Cause(
        "throughput", "logits of answer tokens, half of all", "logits of all tokens", _engine("answers")
    ),
    "activations": Cause(
        "throughput",
        "activations kept where memory is free",
        "every block computed again",
        _engine("activations"),
    ),
    "overlap": Cause(
        "time",
        "exchange of 40 MB behind the next round's training, a sleep of 1 s (federation.staleness=1)",
        "exchange after the training (federation.staleness=0)",
        timed.overlap,
        unit="a round",
        losses="another algorithm: benchmarks/staleness_loss.py",
    ),
    "pipelines": Cause(
        "time",
        "four clients in one pipeline over four hosts, 1 Gbit/s, timed compute",
        "one client after the other in it",
        lambda repeat, quick: timed.pipelines(repeat),
        losses="none with timed compute; equal in tests/engine/test_pipeline_clusters.py",
        hosts=True,
    ),
}


def run(arguments: argparse.Namespace) -> int:
    """Run the part; return the exit code.

    Raises:
        ConfigError: an unknown cause, or too few pairs.
    """
    repeat = LEAST if arguments.quick else arguments.repeat
    names = arguments.only.split(",") if arguments.only else [*CAUSES, "memory"]
    if unknown := sorted(set(names) - {*CAUSES, "memory"}):
        raise ConfigError(f"--only: {unknown[0]} is no cause; there are {', '.join([*CAUSES, 'memory'])}")
    if repeat < LEAST:
        raise ConfigError(f"--repeat={repeat}: an interval needs at least {LEAST} pairs")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    path = arguments.out / "causes.json"
    values = _kept(path, arguments.quick)
    for name in names:
        begin = time.perf_counter()
        print(f"{name} ...", flush=True)
        if name == "memory":
            values["memory"] = memory(arguments.quick)
            values["not_measured"].pop(name, None)
        elif reason := why_not(CAUSES[name], arguments.quick):
            values["not_measured"][name] = reason
        else:
            values["not_measured"].pop(name, None)
            values["causes"][name] = row(name, repeat, arguments.quick)
        print(f"  {time.perf_counter() - begin:.0f} s", flush=True)
        save(path, values)
    report.write(path)
    keep(path, arguments.keep)
    print(path.with_suffix(".md").read_text())
    return 0


def _kept(path: Path, quick: bool) -> dict[str, Any]:
    """Return what an earlier command has measured in the same way: only what is named is measured again."""
    missing = dict.fromkeys((*CAUSES, "memory"), "not asked for")
    values: dict[str, Any] = {"quick": quick, "causes": {}, "memory": {}, "not_measured": missing}
    if path.is_file():
        kept = json.loads(path.read_text())
        if kept["quick"] == quick:
            values |= {key: kept[key] for key in ("causes", "memory", "not_measured")}
    return values


def why_not(cause: Cause, quick: bool) -> str:
    """Return why a cause is not measured; empty if it is."""
    if not cause.hosts:
        return ""
    from tests.lab.cluster import why_not as without_hosts

    return "left out by --quick" if quick else without_hosts() or ""


def row(name: str, repeat: int, quick: bool) -> dict[str, Any]:
    """Measure a cause; return its row of the table."""
    cause = CAUSES[name]
    found = cause.measure(repeat, quick)
    seconds = found["seconds"]
    losses = found["losses"]
    worst = difference(losses["off"], losses["on"]) if losses else None
    return {
        "of": cause.of,
        "on": cause.on,
        "off": cause.off,
        "unit": cause.unit,
        **asdict(ratio(seconds["off"], seconds["on"])),
        "seconds": seconds,
        "losses": cause.losses if worst is None else equal_to(worst),
        "loss_difference": worst,
        "loaded": {variant: n / found["base"] for variant, n in found.get("loaded", {}).items()},
        "model": None if cause.of == "time" else vars(engines.sizes(name, quick)),
        "command": f"python -m fedspeed bench causes --only {name}{' --quick' * quick}",
    }


def memory(quick: bool) -> dict[str, Any]:
    """Count the peak device memory with everything on, with one thing off, and with all of them off."""
    found = {}
    for variant in engines.MEMORY:
        found[variant] = engines.peak(variant, quick)
        print(f"  {variant}: {found[variant]['peak'] / 2**20:.0f} MiB", flush=True)
    first = next(iter(found.values()))
    return {
        "model": vars(engines.sizes("memory", quick)),
        "base": first["base"],
        "command": f"python -m fedspeed bench causes --only memory{' --quick' * quick}",
        "rows": {
            variant: {
                "peak": one["peak"],
                "ratio": one["peak"] / first["peak"],
                "losses": equal_to(difference(one["losses"], first["losses"])),
            }
            for variant, one in found.items()
        },
    }
