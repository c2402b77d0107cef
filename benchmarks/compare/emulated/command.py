"""What `fedspeed bench emulated` does, in order. Results are written after each run, so that an interrupted
command goes on where it ended.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.compare.emulated.cluster import START_S, run_of
from benchmarks.compare.emulated.plans import WAYS, Plan, plan_of
from benchmarks.compare.emulated.plot import draw
from benchmarks.compare.emulated.report import page
from benchmarks.compare.emulated.values import key_of, run_values
from benchmarks.compare.results import keep, save
from benchmarks.compare.simulated.cases import Case, shape_of
from benchmarks.compare.simulated.search import EPOCH
from fedspeed.cluster.hostfile import Host, read
from fedspeed.errors import ConfigError, FedSpeedError


def emulate(arguments: argparse.Namespace) -> int:
    """Make all runs; return the exit code, 1 if one has failed."""
    ways = arguments.way or WAYS
    if unknown := sorted(set(ways) - set(WAYS)):
        raise ConfigError(f"--way={unknown[0]}: is none of {', '.join(WAYS)}")
    hosts = tuple(read(arguments.hostfile).hosts)
    path = arguments.out / "emulated.json"
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.is_file() else []
    failed = 0
    for number, way in enumerate(ways, start=1):
        try:
            plan = plan_of(way, _case(arguments, hosts), arguments.local_steps)
            key = key_of(
                plan, arguments.time_scale, rounds=arguments.rounds, hostfile=Path(arguments.hostfile).name
            )
            if not arguments.again and any(run["key"] == key for run in runs):
                continue
            _announce(plan, f"{number}/{len(ways)}", arguments)
            begin = time.monotonic()
            found = run_of(
                plan,
                hosts,
                rounds=arguments.rounds,
                time_scale=arguments.time_scale,
                launcher=arguments.launcher,
            )
        except FedSpeedError as error:
            print(error, file=sys.stderr)
            failed += 1
            continue
        print(f"  took {time.monotonic() - begin:.0f} s", file=sys.stderr)
        runs = [run for run in runs if run["key"] != key]
        runs.append({"key": key} | run_values(plan, found, arguments.time_scale))
        save(path, {"kind": KIND, "runs": runs})
    if runs:
        text = page(json.loads(path.read_text()))
        path.with_suffix(".md").write_text(text)
        draw(runs, path.with_suffix(".png"))
        keep(path, arguments.keep)
        print(text)
    return int(failed > 0)


def _case(arguments: argparse.Namespace, hosts: tuple[Host, ...]) -> Case:
    return Case(
        shape_of(arguments.model),
        arguments.clients,
        EPOCH,
        tokens=arguments.tokens,
        rows=arguments.rows,
        hosts=hosts,
        settings=tuple(arguments.set),
    )


KIND = "emulated: the real program over limited links, sleeps of the simulator's seconds for arithmetic"


def _announce(plan: Plan, number: str, arguments: argparse.Namespace) -> None:
    expected = START_S + arguments.rounds * plan.simulated.round * arguments.time_scale
    print(
        f"{number}: {plan.way}, {plan.case.shape.name}, {plan.case.clients} clients; about {expected:.0f} s",
        file=sys.stderr,
    )
