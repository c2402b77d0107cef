"""The page of the simulated comparison, from the values of its JSON. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.compare.simulated.fedspeed import CHOSEN, LEAST
from benchmarks.compare.simulated.outcome import ONE_ROW
from fedspeed.planner.hardware import GIB

Values = Mapping[str, Any]
SHOWN = ("as published", "same rows, its best micro-batch")
HEAD = """# FedSpeed beside other methods, simulated

**Nothing here was trained or measured.** Seconds and bytes are those of the planner's model
(docs/planner.md) and of one function for each baseline (benchmarks/compare/simulated/steps.py, memory.py,
exchange.py), with published speeds of the cards. Where a bound is not known, it favours the baseline: stock
ZeRO-3 overlaps loads and arithmetic completely and reads at the whole rate of each card's bus; forward
gradients take the operations of two forward passes, and fused attention; messages cost their bytes only; both
cards of a client's server work for it; SPRY and M2FedSA compute in fp16 where a 2080 Ti takes part, which
their implementations here refuse. FedBiOT's alignment has batches of one row. The first host is the server of
a method that has one, and the clients are on the others. What a step learns is not compared here: a step of
forward gradients learns less than one of gradients (docs/baselines/spry.md).
"""
SEARCH = """## Where the advantage is largest

Servers of two cards each on 10 Gbit/s: eleven with RTX 2080 Ti, eleven with RTX 3090, or hetero10's ten; five
models; 3, 9 or 16 clients; 1, 4, 16 or 64 rows of 128, 512 or 2 048 tokens in a step on each rank. Of all
cases in which FedSpeed fits, the one with the largest ratio among those in which the baseline fits too.
Promised were 17x time and 18x throughput. `as published` a baseline has the rows of its preset in a step, not
FedSpeed's.
"""
MEMORY = """## Device memory

Peak of a client's fullest card over that of `fedspeed, least memory`, the largest of the three tasks, for
each method as published and with micro-batches of one row, as FedSpeed has there. Promised was 6x. The last
line is what that setting pays: its hours over those of the planner's choice.
"""
TABLES = """## Five models, three tasks

GiB: peak of a client's fullest card. Step: a local step of the slowest client. Round, tokens/s: of all
clients, exchange and server included. Hours: one epoch from start to end. Memory, time, throughput: the
method's need over that of `fedspeed, least memory`; its hours over those of `fedspeed`; tokens/s of
`fedspeed` in local steps over the method's; in brackets where the method does not fit and would run on larger
cards only. Causes and exchange are shown for the first task; those of the others are in simulated.json.
"""
FULL = ("method", "rows", "GiB", "step s", "most of it", "exchange s", "round s", "tokens/s", "hours")
SHORT = ("method", "rows", "GiB", "step s", "round s", "tokens/s", "hours")
RATIOS = ("memory", "time", "throughput", "")


def page(values: Values) -> str:
    """Return the page."""
    cap = f", at most {values['cap_gib']:g} GiB a card" if values["cap_gib"] else ""
    parts = [
        HEAD,
        f"{values['date']}, `fedspeed bench simulated`, hostfiles/{values['hostfile']}{cap}.\n",
        *(_search_part(values["search"]) if values["search"] else []),
        MEMORY,
        *_memory_part(values["cases"]),
        TABLES,
        *(_case_part(case, case["task"] == values["cases"][0]["task"]) for case in values["cases"]),
    ]
    return "\n".join(parts)


def _memory_part(cases: Sequence[Values]) -> list[str]:
    """Return the table of the largest memory ratios by method and model."""
    models = list(dict.fromkeys(case["model"] for case in cases))
    largest: dict[tuple[str, str], dict[str, float]] = {}
    slower: dict[str, float] = {}
    for case in cases:
        own = _own(case["methods"])
        slower[case["model"]] = max(slower.get(case["model"], 0.0), _ratios(own[LEAST], own)[1])
        for row in case["methods"]:
            if row["variant"] in (SHOWN[0], ONE_ROW) and "refused" not in row:
                of_row = largest.setdefault((row["method"], row["variant"]), {})
                of_row[case["model"]] = max(of_row.get(case["model"], 0.0), _ratios(row, own)[0])
    lines = {f"{name} | {variant}": found for (name, variant), found in largest.items()}
    lines[f"{LEAST} | hours"] = slower
    return [
        f"| method | rows | {' | '.join(map(_short, models))} |",
        "| --- | --- |" + " ---: |" * len(models),
        *(
            f"| {name} | {' | '.join(f'{found[model]:.2f}' if model in found else '' for model in models)} |"
            for name, found in lines.items()
        ),
        "",
    ]


def _own(rows: Sequence[Values]) -> dict[str, Values]:
    """Return FedSpeed's rows of a case by way."""
    return {row["method"]: row for row in rows if row["method"].startswith("fedspeed")}


def _search_part(found: Sequence[Values]) -> list[str]:
    """Return the section about the largest ratios."""
    refused = [one for one in found if one["variant"] == SHOWN[1]]
    return [
        SEARCH,
        *_table(found, "time", "throughput"),
        "### Where the base is larger than the card of some client, and a step has 16 rows or more a rank\n",
        *_table(found, "missions_time", "missions_throughput"),
        "### What cannot run\n",
        "Cases in which FedSpeed fits and the baseline does not with any micro-batch; of at most 36 for each",
        "model and kind of servers. Refused: cases whose model its implementation here does not train.\n",
        "| baseline | refused | model and cards: cases in which it does not fit |",
        "| --- | ---: | --- |",
        *(f"| {one['baseline']} | {one['refused']} | {_refused(one['does_not_fit'])} |" for one in refused),
        "",
    ]


def _table(found: Sequence[Values], time: str, throughput: str) -> list[str]:
    return [
        "| baseline | rows | runs in | time | 17x | throughput | 18x | where (time) | what most of the "
        "difference is |",
        "| --- | --- | ---: | ---: | --- | ---: | --- | --- | --- |",
        *(_found_line(one, one[time], one[throughput]) for one in found),
        "",
    ]


def _refused(where: Mapping[str, int]) -> str:
    return "; ".join(f"{_short(name)}: {count}" for name, count in where.items()) or "none"


def _found_line(one: Values, time: Values | None, rate: Values | None) -> str:
    start = f"| {one['baseline']} | {one['variant']} | {one['runs_in']} of {one['of_cases']} |"
    if time is None or rate is None:
        return f"{start} runs in none | | | | | |"
    where = (
        f"{_short(time['model'])}, {time['devices']}, {time['clients']} clients, {time['rows_a_rank']} rows "
        f"of {time['tokens']}; {time['baseline_setting']} against {time['own_setting']}"
    )
    reached = f"**{time['ratio']:.2f}** | {_yes(time)} | **{rate['ratio']:.2f}** | {_yes(rate)}"
    return f"{start} {reached} | {where} | {time['mechanism'] or 'the baseline is faster'} |"


def _yes(ratio: Values) -> str:
    return "reached" if ratio["reached"] else "no"


def _short(model: str) -> str:
    return model.rpartition("/")[2].removeprefix("DeepSeek-R1-Distill-")


def _case_part(case: Values, is_full: bool) -> str:
    rows = [row for row in case["methods"] if row["variant"] in ("", *SHOWN)]
    own = _own(rows)
    columns = FULL if is_full else SHORT
    title = (
        f"### {_short(case['model'])}, {case['task']}: {case['clients']} clients, {case['rows_a_rank']} rows "
        f"of {case['tokens']} tokens on each rank\n"
    )
    head = [
        f"| {' | '.join((*columns, *RATIOS))} |",
        "| --- | --- |" + " --- |" * (len(columns) - 2 + len(RATIOS)),
    ]
    return "\n".join([title, *head, *(_line(row, own, columns) for row in rows), ""])


def _line(row: Values, own: Mapping[str, Values], columns: Sequence[str]) -> str:
    if "refused" in row:
        empty = " |" * (len(columns) - 2 + len(RATIOS) - 1)
        return f"| {row['method']} | {row['variant']} |{empty} {row['refused']} |"
    kind, causes = max(row["step_s"].items(), key=lambda item: sum(item[1].values()))
    most = sorted(causes.items(), key=lambda item: -item[1])[:3]
    shown = {
        "method": row["method"],
        "rows": row["variant"] or row["setting"],
        "GiB": f"{row['device_bytes'] / GIB:.1f}",
        "step s": f"{sum(causes.values()):.3g}",
        "most of it": f"{kind}: " + ", ".join(f"{cause} {s:.3g}" for cause, s in most if s),
        "exchange s": f"{row['exchange_s']:.3f}",
        "round s": f"{row['round_s']:.4g}",
        "tokens/s": f"{row['tokens_s']:,.0f}",
        "hours": f"{row['epoch_h']:.3f}",
    }
    ratios = [f"{ratio:.2f}" if row["fits"] else f"({ratio:.2f})" for ratio in _ratios(row, own)]
    note = f"does not fit: {row['shortage']}" if row["shortage"] else ""
    return f"| {' | '.join([*(shown[column] for column in columns), *ratios, note])} |"


def _ratios(row: Values, own: Mapping[str, Values]) -> tuple[float, float, float]:
    """Return (memory, time, throughput) of FedSpeed against a method."""
    least = own[LEAST]
    chosen = own[CHOSEN]
    return (
        row["device_bytes"] / least["device_bytes"],
        row["epoch_h"] / chosen["epoch_h"],
        chosen["training_tokens_s"] / row["training_tokens_s"],
    )
