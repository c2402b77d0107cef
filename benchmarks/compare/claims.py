"""`fedspeed bench claims`: the tables of docs/claims.md, from the kept results of the other parts."""

import argparse
import json
import re
from typing import Any

from benchmarks.compare.results import ROOT

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
OURS = "fedspeed_ram"  # in memory.json
OURS_SIMULATED = "fedspeed, least memory"
GIB = 2**30
DISTILLED = "deepseek-ai/DeepSeek-R1-Distill-"
SIMULATED_MODEL = "Qwen-7B"
SIMULATED_TASK = "code generation"


def add(commands: argparse._SubParsersAction) -> None:
    """Add the part to the parser."""
    parser = commands.add_parser(
        "claims",
        help="write the tables of docs/claims.md from the kept results",
        description="Write the tables of docs/claims.md from benchmarks/results/compare/*.json.",
    )
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the tables; return the exit code."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
    print(f"{PAGE}: its tables are those of the results")
    return 0


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
        "throughput": search_table(simulated, "throughput"),
    }


def memory_table(memory: dict[str, Any], simulated: dict[str, Any]) -> str:
    """Return the table of device memory: measured on the largest model, and simulated for another one."""
    from fedspeed.monitor.tables import table
    from fedspeed.units import bytes_text, parameters_text

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
    from fedspeed.monitor.tables import table

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


def verdict(ratio: float | None, goal: float) -> str:
    """Return whether a goal is reached."""
    if ratio is None:
        return "-"
    return "reached" if ratio >= goal else "not reached"


def _result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
