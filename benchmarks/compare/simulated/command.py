"""What `fedspeed bench simulated` does, in order; it shows its progress on one line."""

import argparse
import json
import sys
import time
from collections.abc import Callable

from benchmarks.compare.results import keep, save
from benchmarks.compare.simulated.cases import BASELINES, Case, capped, shape_of
from benchmarks.compare.simulated.fedspeed import trained
from benchmarks.compare.simulated.outcome import ONE_ROW, outcomes, variants_of
from benchmarks.compare.simulated.plot import draw
from benchmarks.compare.simulated.report import page
from benchmarks.compare.simulated.search import cases, search
from benchmarks.compare.simulated.values import case_values, found_values, outcome_values
from fedspeed.cluster.hostfile import read
from fedspeed.errors import FedSpeedError
from fedspeed.planner.simulate import MODELS, TASKS

PROGRESS_S = 5.0  # between two lines


def simulate(arguments: argparse.Namespace) -> int:
    """Write simulated.json, then the page and the plot from it."""
    hosts = capped(read(arguments.hostfile).hosts, arguments.cap)
    tables = []
    for model in MODELS:
        for job in TASKS:
            case = Case(
                shape_of(model),
                job.clients,
                job.rows,
                tokens=arguments.tokens,
                rows=arguments.rows,
                hosts=hosts,
            )
            tables.append({"task": job.name} | table_of(case))
    found = []
    if not arguments.no_search:
        searched = list(cases())
        found = [found_values(one) for one in search(searched, _progress(len(searched)))]
    path = arguments.out / "simulated.json"
    values = {
        "kind": "simulated: a model of time and memory; nothing was trained or measured",
        "hostfile": arguments.hostfile.name,
        "cap_gib": arguments.cap,
        "cases": tables,
        "search": found,
    }
    save(path, values)
    text = page(json.loads(path.read_text()))
    path.with_suffix(".md").write_text(text)
    draw(values, path.with_suffix(".png"))
    keep(path, arguments.keep)
    print(text)
    return 0


def table_of(case: Case) -> dict:
    """Return the values of all methods for a case; of a method that cannot train the model, why."""
    rows = [outcome_values(one) for one in trained(case).values()]
    for method in BASELINES:
        for variant in (*variants_of(method), ONE_ROW):
            try:
                rows.append(outcome_values(outcomes(method, case, variant)))
            except FedSpeedError as error:
                rows.append({"method": method, "variant": variant, "refused": str(error)})
    return case_values(case) | {"methods": rows}


def _progress(whole: int) -> Callable[[int], None]:
    begin = time.monotonic()
    shown = begin

    def show(done: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= PROGRESS_S or done == whole:
            shown = now
            passed = now - begin
            left = passed * (whole - done) / done
            print(f"search: {done}/{whole} cases, {passed:.0f} s, {left:.0f} s left", file=sys.stderr)

    return show
