"""The tables of docs/claims.md, from the kept results of the other parts."""

import json
import re
import statistics
from typing import Any

from benchmarks.compare.measured.records import Bench, read
from benchmarks.compare.measured.report import ratio_text
from benchmarks.compare.measured.statistics import Interval, first_at, ratio
from benchmarks.compare.results import ROOT
from fedspeed.monitor.tables import table
from fedspeed.units import bytes_text, parameters_text

PAGE = ROOT / "docs" / "claims.md"
RESULTS = ROOT / "benchmarks" / "results" / "compare"
# The five that the claims name, and the strong ones that they leave out.
NAMED = {
    "fs_llm": "FederatedScope-LLM",
    "fate_llm": "FATE-LLM",
    "fedbiot": "FedBiOT",
    "m2fedsa": "M2FedSA",
    "spry": "SPRY",
}
STRONG = {
    "fs_llm_offload": "FederatedScope-LLM, its ZeRO-3 offload",
    "fedavg_lora": "FedAvg-LoRA, checkpointed",
    "zero3_offload": "stock ZeRO-3 offload",
}
MEMORY_GOAL = 6.0
TIME_GOAL = 17.0
TARGET_MODEL = "Qwen-1.5B"
DIRECTIONS = "federation.method.perturbations"
OURS = "fedspeed_ram"  # in memory.json
OURS_SIMULATED = "fedspeed, least memory"
GIB = 2**30
DISTILLED = "deepseek-ai/DeepSeek-R1-Distill-"
SIMULATED_MODEL = "Qwen-7B"
SIMULATED_TASK = "code generation"


def write() -> None:
    """Write the tables into the page."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")


def filled(page: str, found: dict[str, str]) -> str:
    """Return a page with each table between its two marks: `<!-- NAME -->` and `<!-- end of NAME -->`."""
    for name, text in found.items():
        marks = (f"<!-- {name} -->", f"<!-- end of {name} -->")
        assert all(page.count(mark) == 1 for mark in marks), f"{PAGE.name} has no place for the table {name}"
        pattern = re.escape(marks[0]) + ".*" + re.escape(marks[1])
        page = re.sub(pattern, lambda _: f"{marks[0]}\n{text}\n{marks[1]}", page, flags=re.DOTALL)
    return page


def tables() -> dict[str, str]:
    """Return the tables by name."""
    simulated = _result("simulated")
    return {
        "memory": memory_table(_result("memory"), simulated),
        "time": search_table(simulated, "time"),
        "target": target_table(read(RESULTS / "target" / "bench.json"), simulated),
        "throughput": search_table(simulated, "throughput"),
    }


def memory_table(memory: dict[str, Any], simulated: dict[str, Any]) -> str:
    """Return the table of device memory: measured on the largest model, and simulated for another one."""
    largest = max(memory["sizes"], key=lambda size: size["parameters"])
    measured = {run["arm"]: run["device_bytes"] for run in largest["runs"]}
    case = next(
        case
        for case in simulated["cases"]
        if case["model"].endswith(SIMULATED_MODEL) and case["task"] == SIMULATED_TASK
    )
    rows = []
    for name, title in (NAMED | STRONG).items():
        peak = measured.get(name)
        ratio = peak / measured[OURS] if peak else None
        best = min(
            (method for method in case["methods"] if method["method"] == name and method["device_bytes"]),
            key=lambda method: method["device_bytes"],
        )
        ours = next(method for method in case["methods"] if method["method"] == OURS_SIMULATED)
        rows.append([
            title,
            bytes_text(peak) if peak else "-",
            f"{ratio:.2f}x" if ratio else "-",
            verdict(ratio, MEMORY_GOAL),
            f"{best['device_bytes'] / GIB:.1f} GiB",
            f"{best['device_bytes'] / ours['device_bytes']:.2f}x",
            "" if best["fits"] else best["shortage"],
        ])
    header = [
        "beside",
        f"measured, {parameters_text(largest['parameters'])}",
        f"of FedSpeed's {bytes_text(measured[OURS])}",
        "6x",
        f"simulated, {SIMULATED_MODEL}, its smallest",
        f"of FedSpeed's {ours['device_bytes'] / GIB:.1f} GiB",
        "does not fit",
    ]
    return table(header, rows, (1, 2, 4, 5))


def search_table(simulated: dict[str, Any], kind: str) -> str:
    """Return the table of the largest ratios of a kind, `time` or `throughput`, that the search found."""
    rows = []
    for name, title in (NAMED | STRONG).items():
        found = [entry for entry in simulated["search"] if entry["baseline"] == name]
        published = next((entry for entry in found if entry["variant"] == "as published"), None)
        best = max(found, key=lambda entry: entry[kind]["ratio"])
        mission = [entry[f"missions_{kind}"] for entry in found if entry[f"missions_{kind}"]]
        largest = max((entry["ratio"] for entry in mission), default=None)
        one = best[kind]
        where = (
            f"{one['model'].removeprefix(DISTILLED)}, {one['devices']}, {one['clients']} clients, "
            f"{one['rows_a_rank']} rows of {one['tokens']}"
        )
        goal = one["goal"]
        rows.append([
            title,
            f"{published[kind]['ratio']:.2f}x" if published else "-",
            f"{one['ratio']:.2f}x ({best['variant']})",
            verdict(one["ratio"], goal),
            where,
            one["mechanism"],
            f"{largest:.2f}x" if largest else "runs in none",
            f"{best['of_cases'] - best['runs_in']} of {best['of_cases']}",
        ])
    header = [
        "beside",
        "as published",
        "largest",
        f"{goal:g}x",
        "where",
        "by what",
        "where the model fits no card, 16 rows or more",
        "cases in which it cannot run",
    ]
    return table(header, rows, (1, 2, 6, 7))


def target_table(bench: Bench, simulated: dict[str, Any]) -> str:
    """Return the table of the time to a target loss of methods whose steps learn less: local steps measured
    on a small model, times the seconds of a step simulated on a large one, which is of one direction.
    """
    reference, *others = bench.setting.arms
    case = next(case for case in simulated["cases"] if case["model"].endswith(TARGET_MODEL))
    rates = {method["method"]: method["training_tokens_s"] for method in case["methods"]}
    own = steps_to_target(bench, reference)
    rows = []
    for name in others:
        steps = steps_to_target(bench, name)
        found = ratio(steps, own)
        directions = float(_argument(bench, name, DIRECTIONS) or 1)
        slower = directions * rates[reference] / rates[name]
        whole = found and Interval(*(value and value * slower for value in found))
        rows.append([
            bench.setting.arms[name],
            f"{statistics.median(steps.values()):g}" if steps else "not reached",
            ratio_text(found) if found else "-",
            f"{slower:.2f}x ({directions:g} directions)",
            ratio_text(whole) if whole else "-",
            _sure_verdict(whole, TIME_GOAL),
        ])
    header = [
        "beside",
        f"local steps to {bench.setting.target:g}, measured with {bench.setting.model}",
        f"of FedSpeed's {statistics.median(own.values()):g}",
        f"a step, simulated, {TARGET_MODEL}",
        "time to the target",
        "17x",
    ]
    return table(header, rows, (1, 2, 3, 4))


def steps_to_target(bench: Bench, arm: str) -> dict[int, float]:
    """Return the local steps after which an arm has reached the target loss, by seed; those that have not
    are left out.
    """
    assert bench.setting.target is not None
    steps = float(_argument(bench, arm, "train.local_steps") or 0)
    points = {seed: first_at(run.curve, bench.setting.target) for seed, run in bench.of(arm).items()}
    return {seed: steps * point.round for seed, point in points.items() if point is not None}


def _argument(bench: Bench, arm: str, key: str) -> str | None:
    """Return the value that a key has on the command lines of an arm."""
    texts = {text for run in bench.of(arm).values() for text in run.arguments}
    return next((text.partition("=")[2] for text in texts if text.startswith(f"{key}=")), None)


def _sure_verdict(interval: Interval | None, goal: float) -> str:
    """Return whether a goal is reached by the mean, and by the whole interval."""
    if interval is None or interval.mean < goal:
        return verdict(interval and interval.mean, goal)
    is_sure = interval.low is not None and interval.low >= goal
    return "reached" if is_sure else "reached by the mean, not by the whole interval"


def verdict(ratio: float | None, goal: float) -> str:
    """Return whether a goal is reached."""
    if ratio is None:
        return "-"
    return "reached" if ratio >= goal else "not reached"


def _result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
