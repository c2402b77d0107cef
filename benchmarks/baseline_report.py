"""The page and the plot of the baselines: what each method costs, beside its formula, and what it learns."""

import json
from pathlib import Path

from benchmarks.baseline_formulas import Model
from benchmarks.baseline_runs import RESULTS, ROOT

TASKS = ("gsm8k", "dolly")
REMARKS = "## Remarks"
HEAD = """\
# The baselines: costs and learning

SmolLM2-135M-Instruct, LoRA of rank 8 on q and v, bf16 on CPUs; `python benchmarks/baselines.py cost`, `learn`
and `report`. What the methods are: docs/baselines.md.
"""
COSTS = """\
## Costs

Bytes of one client (or of the method's server): weights of the frozen base, fp32 masters and moments, and
what is sent in a round of two local steps of two rows, for three clients and the plain sum. Behind each
measured number its difference from the formula of benchmarks/baseline_formulas.py. The peak is that of all
tensors on a client's device in such a step; what it exceeds weights and optimizer by are activations,
gradients and working copies.

| method | role | weights | optimizer | sent in a round | peak |
| --- | --- | ---: | ---: | ---: | ---: |
"""


def write_report() -> None:
    """Write benchmarks/results/baselines.md and its plot from the numbers that are there; the text from
    "## Remarks" on is kept.
    """
    page = RESULTS.parent / "baselines.md"
    remarks = ""
    if page.exists() and REMARKS in (text := page.read_text(encoding="utf-8")):
        remarks = text[text.index(REMARKS) :]
    parts = [HEAD, _costs(_numbers("costs")), _native()]
    results = {task: _numbers(f"learning-{task}") for task in TASKS}
    parts += [_learning(task, entries) for task, entries in results.items() if entries]
    if any(results.values()):
        _plot({task: _best(entries) for task, entries in results.items()}, RESULTS.parent / "baselines.png")
        parts.append("![what is learned](baselines.png)\n")
    page.write_text("\n".join([*parts, remarks]), encoding="utf-8")


def _numbers(name: str) -> dict[str, dict]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _costs(entries: dict[str, dict]) -> str:
    rows = []
    for name, entry in entries.items():
        for role in ("client", "server"):
            if role in entry:
                cells = [_compared(*entry[role][key]) for key in ("weights", "optimizer", "sent")]
                peak = f"{entry['peak'] / 1e6:.0f} MB" if role == "client" else ""
                rows.append(f"| `{name}` | {role} | {' | '.join(cells)} | {peak} |")
    return COSTS + "\n".join(rows) + "\n"


def _compared(measured: float, expected: float) -> str:
    """Return a number of bytes and its difference from a formula."""
    difference = 0.0 if measured == expected else measured / expected - 1
    return f"{measured / 1e6:.3f} MB ({difference:+.1%})"


def _native() -> str:
    """Return what FederatedScope-LLM's own messages would take, beside the state as it is sent here."""
    from fedspeed.federation.methods.fs_llm.native_size import base64_bytes

    model = Model.read(ROOT / "runs" / "smollm2-135m")
    factors = {"a": (model.rank, model.hidden), "q": (model.hidden, model.rank), "v": (model.kv, model.rank)}
    shapes = {
        f"{block}.{matrix}.{factor}": factors[factor]
        for block in range(model.blocks)
        for matrix, pair in (("q", ("a", "q")), ("v", ("a", "v")))
        for factor in pair
    }
    ours = 4 * model.lora()
    native = base64_bytes(shapes, "fp32")
    return (
        f"The factors take {ours / 1e6:.3f} MB as fp32 arrays, and {native / 1e6:.3f} MB "
        f"({native / ours:.3f} times as much) in the base64 of FederatedScope-LLM's own messages, which are "
        "not sent here.\n"
    )


def _best(entries: dict[str, dict]) -> dict[str, dict]:
    """Return each method's run with the lowest loss."""
    best: dict[str, dict] = {}
    for entry in entries.values():
        known = best.get(entry["method"])
        if known is None or entry["loss_after"] < known["loss_after"]:
            best[entry["method"]] = entry
    return dict(sorted(best.items(), key=lambda item: item[1]["loss_after"]))


def _learning(task: str, entries: dict[str, dict]) -> str:
    rows = []
    for method, entry in _best(entries).items():
        tried = [of for of in entries.values() if of["method"] == method]
        losses = ", ".join(
            f"{of['lr']:g}: {of['loss_after']:.4f}" for of in sorted(tried, key=lambda of: of["lr"])
        )
        loss = f"{entry['loss_before']:.4f} | {entry['loss_after']:.4f}"
        cost = f"{entry['tokens']:,} | {entry['seconds']:.0f} s"
        rows.append(f"| `{method}` | {loss} | {entry['lr']:g} | {losses} | {cost} |")
    head = "| method | before | after | best lr | all three | answer tokens | seconds |"
    return "\n".join([
        f"## {task}: held-out loss per answer token\n",
        head,
        "| --- | ---: | ---: | ---: | --- | ---: | ---: |",
        *rows,
        "",
    ])


def _plot(best: dict[str, dict[str, dict]], path: Path) -> None:
    """Draw how far each method's best run has lowered the held-out loss, a panel for each task."""
    from fedspeed.monitor.plots import BLUE, new_figure, png

    panels = {task: methods for task, methods in best.items() if methods}
    figure = new_figure(5.5 * len(panels), 4.2)
    for number, (task, methods) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), number)
        names = list(methods)[::-1]
        lowered = [methods[name]["loss_before"] - methods[name]["loss_after"] for name in names]
        axes.barh(names, lowered, color=BLUE)
        axes.set_xlabel("held-out loss per answer token, lowered by")
        axes.set_title(f"{task}: best of three learning rates")
    path.write_bytes(png(figure))
