"""The tables of docs/claims.md and of README.md, from the kept results of the other parts."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks.compare.claims.readme import outside_table, quick_table
from benchmarks.compare.measured.records import Bench, read
from benchmarks.compare.measured.report import ratio_text
from benchmarks.compare.measured.statistics import Interval, first_at, ratio
from benchmarks.compare.results import ROOT
from benchmarks.compare.simulated.outcome import BEST, PUBLISHED
from benchmarks.compare.simulated.search import RATE_GOAL, TIME_GOAL
from fedspeed.monitor.tables import table
from fedspeed.units import bytes_text, parameters_text

PAGE = ROOT / "docs" / "claims.md"
README = ROOT / "README.md"
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
GOALS = {"time": TIME_GOAL, "throughput": RATE_GOAL}
TARGET_MODEL = "Qwen-1.5B"
OF_METHOD = "federation.method."
STEPS = "train.local_steps="
OURS = "fedspeed_ram"  # in memory.json; with its base on the device:
OURS_RESIDENT = "fedspeed"
OURS_SIMULATED = "fedspeed, least memory"
OURS_EMULATED = "fedspeed"
OWN_WAYS = {"fedspeed, plain sum": "FedSpeed, plain sum", "fedspeed, staleness 1": "FedSpeed, staleness 1"}
GIB = 2**30
DISTILLED = "deepseek-ai/DeepSeek-R1-Distill-"
SIMULATED_MODEL = "Qwen-7B"
SIMULATED_TASK = "code generation"


def write() -> None:
    """Write the tables into the pages."""
    for page, found in tables().items():
        page.write_text(filled(page.read_text(encoding="utf-8"), found), encoding="utf-8")


def filled(page: str, found: dict[str, str]) -> str:
    """Return a page with each table between its two marks: `<!-- NAME -->` and `<!-- end of NAME -->`."""
    for name, text in found.items():
        marks = (f"<!-- {name} -->", f"<!-- end of {name} -->")
        assert all(page.count(mark) == 1 for mark in marks), f"the page has no place for the table {name}"
        pattern = re.escape(marks[0]) + ".*" + re.escape(marks[1])
        page = re.sub(pattern, lambda _: f"{marks[0]}\n{text}\n{marks[1]}", page, flags=re.DOTALL)
    return page


def tables() -> dict[Path, dict[str, str]]:
    """Return the tables of each page, by name."""
    simulated = _result("simulated")
    emulated = _result("emulated")
    return {
        PAGE: {
            "verdicts": verdict_table(_result("memory"), simulated),
            "memory": memory_table(_result("memory"), simulated),
            "time": search_table(simulated, "time"),
            "target": target_table(read(RESULTS / "target" / "bench.json"), emulated),
            "throughput": search_table(simulated, "throughput"),
            "emulated": emulated_table(emulated),
        },
        README: {
            "quick": quick_table(read(RESULTS / "quick" / "bench.json")),
            "outside": outside_table(_result("outside")),
        },
    }


def verdict_table(memory: dict[str, Any], simulated: dict[str, Any]) -> str:
    """Return the table of all claims against all baselines: the largest ratios and whether they suffice."""
    _, measured = _largest(memory)
    rows = []
    for name, title in (NAMED | STRONG).items():
        cells = [_verdict_text(measured[name]["device_bytes"] / measured[OURS]["device_bytes"], MEMORY_GOAL)]
        found = _variants_of(simulated, name)
        for kind, goal in GOALS.items():
            most = _most(found, kind)
            fair = found[BEST][kind]
            is_other = fair is not None and fair["ratio"] != most
            equal = f"; with equal steps {fair['ratio']:.2f}x" if is_other else ""
            cells += [
                f"{_verdict_text(most, goal)}{equal}",
                _verdict_text(_most(found, f"missions_{kind}"), goal),
            ]
        rows.append([title, *cells])
    header = [
        "beside",
        f"{MEMORY_GOAL:g}x device memory, measured",
        *(
            text
            for kind, goal in GOALS.items()
            for text in (
                f"{goal:g}x {kind}, simulated, largest",
                f"{goal:g}x {kind} where a card is smaller than the base, 16 rows or more",
            )
        ),
    ]
    return table(header, rows, range(1, 6))


def _variants_of(simulated: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """Return what the search has found of a baseline, by variant."""
    return {entry["variant"]: entry for entry in simulated["search"] if entry["baseline"] == name}


def _most(found: dict[str, dict[str, Any]], kind: str) -> float | None:
    """Return the largest ratio of a kind in any variant; None: the baseline fits in no case."""
    return max((entry[kind]["ratio"] for entry in found.values() if entry[kind]), default=None)


def _verdict_text(ratio: float | None, goal: float) -> str:
    return "the baseline fits in no such case" if ratio is None else f"{ratio:.2f}x, {verdict(ratio, goal)}"


def memory_table(memory: dict[str, Any], simulated: dict[str, Any]) -> str:
    """Return the table of device memory: measured on the largest model, and simulated for another one."""
    parameters, measured = _largest(memory)
    own = measured[OURS]
    case = next(
        case
        for case in simulated["cases"]
        if case["model"].endswith(SIMULATED_MODEL) and case["task"] == SIMULATED_TASK
    )
    rows = []
    for name, title in (NAMED | STRONG).items():
        run = measured[name]
        ratio = run["device_bytes"] / own["device_bytes"]
        best = min(
            (one for one in case["methods"] if one["method"] == name and "device_bytes" in one),
            key=lambda method: method["device_bytes"],
        )
        ours = next(method for method in case["methods"] if method["method"] == OURS_SIMULATED)
        rows.append([
            title,
            bytes_text(run["device_bytes"]),
            f"{ratio:.2f}x",
            verdict(ratio, MEMORY_GOAL),
            f"{best['device_bytes'] / GIB:.1f} GiB",
            f"{best['device_bytes'] / ours['device_bytes']:.2f}x",
            "" if best["fits"] else best["shortage"],
        ])
    resident = measured[OURS_RESIDENT]["device_bytes"]
    cells = [bytes_text(resident), f"{resident / own['device_bytes']:.2f}x"]
    rows.append(["FedSpeed itself, base on the device", *cells, *["-"] * 4])
    header = [
        "beside",
        f"measured, {parameters_text(parameters)}",
        f"of FedSpeed's {bytes_text(own['device_bytes'])}",
        f"{MEMORY_GOAL:g}x",
        f"simulated, {SIMULATED_MODEL}, its smallest",
        f"of FedSpeed's {ours['device_bytes'] / GIB:.1f} GiB",
        "does not fit",
    ]
    return table(header, rows, (1, 2, 4, 5))


def _largest(memory: dict[str, Any]) -> tuple[int, dict[str, dict[str, Any]]]:
    """Return the parameters of the largest model whose memory was measured, and its runs by arm."""
    largest = max(memory["sizes"], key=lambda size: size["parameters"])
    return largest["parameters"], {run["arm"]: run for run in largest["runs"]}


def search_table(simulated: dict[str, Any], kind: str) -> str:
    """Return the table of the largest ratios of a kind, `time` or `throughput`, that the search found."""
    goal = GOALS[kind]
    rows = []
    for name, title in (NAMED | STRONG).items():
        found = _variants_of(simulated, name)
        ratios = {variant: entry[kind] for variant, entry in found.items() if entry[kind]}
        variant, one = max(ratios.items(), key=lambda item: (item[1]["ratio"], item[0] == BEST))
        fair = found[BEST]
        rows.append([
            title,
            *(f"{ratios[of]['ratio']:.2f}x" if of in ratios else "-" for of in (BEST, PUBLISHED)),
            f"{one['ratio']:.2f}x" + ("" if variant == BEST else f" ({variant})"),
            verdict(one["ratio"], goal),
            _where(one),
            one["mechanism"] or "the baseline is faster",
            _verdict_text(_most(found, f"missions_{kind}"), goal),
            f"{found[variant][f'{kind}_reached_in']} of {found[variant]['runs_in']}",
            f"{sum(fair['does_not_fit'].values())} of {fair['of_cases']}",
        ])
    header = [
        "beside",
        BEST,
        PUBLISHED,
        "largest of all",
        f"{goal:g}x",
        "where the largest is",
        "what most of the difference is",
        "largest where some client's card is smaller than the base, 16 rows or more",
        f"cases with {goal:g}x",
        "does not fit in",
    ]
    return table(header, rows, (1, 2, 3, 7, 8, 9))


def _where(ratio: dict[str, Any]) -> str:
    rows = ratio["rows_a_rank"]
    return (
        f"{ratio['model'].removeprefix(DISTILLED)}, {ratio['devices']}, {ratio['clients']} clients, "
        f"{rows} row{'s' * (rows > 1)} of {ratio['tokens']}"
    )


def target_table(bench: Bench, emulated: dict[str, Any]) -> str:
    """Return the table of the time to a target loss of methods whose steps learn less: local steps measured
    on a small model, times the seconds of a step emulated for a large one.
    """
    reference, *others = bench.setting.arms
    seconds = {name: _step_s(bench, emulated, name) for name in bench.setting.arms}
    own = steps_to_target(bench, reference)
    rows = []
    for name in others:
        steps = steps_to_target(bench, name)
        missed = len(bench.of(name)) - len(steps)
        found = ratio(steps, own) if not missed else None
        slower = _quotient(seconds[name], seconds[reference])
        whole = found and slower and Interval(*(value and value * slower for value in found))
        rows.append([
            bench.setting.arms[name],
            _steps_text(steps, missed, len(bench.of(name))),
            ratio_text(found) if found else "-",
            f"{slower:.2f}x" if slower else "-",
            ratio_text(whole) if whole else "-",
            "not reached by all seeds" if missed else _sure_verdict(whole, TIME_GOAL),
        ])
    header = [
        "beside",
        f"local steps to {bench.setting.target:g}, measured with {bench.setting.model}; FedSpeed's: "
        f"{statistics.median(own.values()):g}",
        "ratio, mean over the seeds",
        f"a step with its share of the exchange, emulated, {TARGET_MODEL}",
        "measured steps times emulated seconds",
        "17x",
    ]
    return table(header, rows, (1, 2, 3, 4))


def _step_s(bench: Bench, emulated: dict[str, Any], arm: str) -> float | None:
    """Return the emulated seconds of a local step of an arm with its share of what else is in a round, for
    rounds of as many local steps and the settings of the method that it was measured with; None: it was not
    emulated.
    """
    steps = _local_steps(bench, arm)
    settings = [
        text
        for text in sorted(_arguments_of(bench, arm))
        if text.startswith(OF_METHOD) and not text.startswith(OF_METHOD + "name")
    ]
    for run in emulated["runs"]:
        is_same = run["way"] == arm and run["model"].endswith(TARGET_MODEL) and run["time_scale"] == 1
        if is_same and sorted(run["settings"]) == settings:
            compute = run["emulated"]["compute"]
            return compute / run["local_steps"] + (run["emulated"]["round"] - compute) / steps
    return None


def _quotient(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _steps_text(steps: dict[int, float], missed: int, seeds: int) -> str:
    """Return the median of the local steps to a target, and the seeds that have not reached it."""
    if not steps:
        return "not reached"
    return f"{statistics.median(steps.values()):g}" + (f"; {missed} of {seeds} seeds never" if missed else "")


def _runs_of(emulated: dict[str, Any], model: str) -> dict[str, dict[str, Any]]:
    """Return the emulated runs of a model by way, as fast as they are and with the number of local steps that
    the first of them has.
    """
    runs = [run for run in emulated["runs"] if run["model"].endswith(model) and run["time_scale"] == 1]
    return {run["way"]: run for run in runs if run["local_steps"] == runs[0]["local_steps"]}


def emulated_table(emulated: dict[str, Any]) -> str:
    """Return the table of emulated rounds beside FedSpeed's, whose sum is masked, and the same simulated."""
    runs = _runs_of(emulated, SIMULATED_MODEL)
    ours = runs[OURS_EMULATED]
    rows = []
    for name, title in (NAMED | STRONG | OWN_WAYS).items():
        if (run := runs.get(name)) is None:
            rows.append([title, *["-"] * 6])
            continue
        ratios = {kind: run[kind]["round"] / ours[kind]["round"] for kind in ("emulated", "simulated")}
        rows.append([
            title,
            f"{run['emulated']['round']:.2f} s",
            f"{ratios['emulated']:.2f}x",
            "-" if name in OWN_WAYS else verdict(ratios["emulated"], TIME_GOAL),
            f"{run['simulated']['round']:.2f} s",
            f"{ratios['simulated']:.2f}x",
            run["shortage"],
        ])
    header = [
        "beside",
        "a round, emulated",
        f"of FedSpeed's {ours['emulated']['round']:.2f} s",
        f"{TIME_GOAL:g}x",
        "a round, simulated",
        f"of FedSpeed's {ours['simulated']['round']:.2f} s",
        "does not fit",
    ]
    return table(header, rows, (1, 2, 4, 5))


def steps_to_target(bench: Bench, arm: str) -> dict[int, float]:
    """Return the local steps after which an arm has reached the target loss, by seed; those that have not
    are left out.
    """
    assert bench.setting.target is not None
    steps = _local_steps(bench, arm)
    points = {seed: first_at(run.curve, bench.setting.target) for seed, run in bench.of(arm).items()}
    return {seed: steps * point.round for seed, point in points.items() if point is not None}


def _local_steps(bench: Bench, arm: str) -> int:
    """Return the local steps of a round of an arm."""
    texts = _arguments_of(bench, arm)
    return next(int(text.removeprefix(STEPS)) for text in texts if text.startswith(STEPS))


def _arguments_of(bench: Bench, arm: str) -> set[str]:
    """Return the arguments of all runs of an arm."""
    return {text for run in bench.of(arm).values() for text in run.arguments}


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
