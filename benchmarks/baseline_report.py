"""The page and the plot of the baselines: what each method costs, beside its formula, and what it learns."""

import json
from pathlib import Path

from benchmarks.baseline_formulas import Model
from benchmarks.baseline_runs import RESULTS, ROOT

TASKS = ("gsm8k", "dolly")
REMARKS = "## Remarks"
HEAD = """\
# The baselines: costs and learning

SmolLM2-135M-Instruct on CPUs in bf16, LoRA of rank 8 with alpha 16; `python benchmarks/baselines.py cost`,
`learn` and `report`. What the methods are: docs/baselines.md. Every method has its preset, except for what
benchmarks/baseline_learning.py and baseline_costs.py set: the same rank, rows, numbers of rounds and steps
for all (so rounds of `spry` and `fate_llm` are not epochs), and no clipping or schedule. What no preset sets
is as in ds_configs/gsm8k_smol.yaml (server momentum 0.5) and dolly_smol.yaml (none). In learning,
`spry` and `spry_iteration` have rank 1, two directions a step and plain SGD without FedYogi, and `fedkseed`
two directions a step.
"""
COSTS = """\
## Costs

Bytes of one client, or of the method's server: weights of the frozen base, wherever they are stored; fp32
masters and moments; and what is sent in a round of two local steps of two rows, for three clients and the
plain sum. In brackets the difference from the formula of benchmarks/baseline_formulas.py; above 5 % it is
marked with (!). The peak is that of all tensors on a client's device in its first step, and the last column
what remains of it without what is stored there: activations, gradients, working copies and buffers.

| method | role | weights | optimizer | sent in a round | peak | without weights and optimizer |
| --- | --- | ---: | ---: | ---: | ---: | ---: |
"""
MOST = 0.05  # difference from a formula that is not remarked on
# Methods whose base, and whose optimizer, are in host memory.
BASE_AWAY = ("zero3_offload", "fs_llm_offload")
OPTIMIZER_AWAY = (*BASE_AWAY, "fate_llm", "fate_llm compact")


def write_report() -> int:
    """Write benchmarks/results/baselines.md and its plot from the numbers that are there; the text from
    "## Remarks" on is kept.

    Returns:
        the exit code: 1 where a cost differs from its formula by more than MOST.
    """
    page = RESULTS.parent / "baselines.md"
    remarks = ""
    if page.exists() and REMARKS in (text := page.read_text(encoding="utf-8")):
        remarks = text[text.index(REMARKS) :]
    costs = _costs(_numbers("costs"))
    parts = [HEAD, costs, _native()]
    results = {task: _with_base(_numbers(f"learning-{task}")) for task in TASKS}
    parts += [_learning(task, entries) for task, entries in results.items() if entries]
    if any(results.values()):
        _plot({task: _best(entries) for task, entries in results.items()}, RESULTS.parent / "baselines.png")
        parts.append("![what is learned](baselines.png)\n")
    page.write_text("\n".join([*parts, remarks]), encoding="utf-8")
    return int("%) (!)" in costs)


def _numbers(name: str) -> dict[str, dict]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _costs(entries: dict[str, dict]) -> str:
    rows = []
    for name, entry in entries.items():
        for role in ("client", "server"):
            if role in entry:
                cells = [_compared(*entry[role][key]) for key in ("weights", "optimizer", "sent")]
                peak = _peak(name, entry) if role == "client" else " | "
                rows.append(f"| `{name}` | {role} | {' | '.join(cells)} | {peak} |")
    return COSTS + "\n".join(rows) + "\n"


def _peak(name: str, entry: dict) -> str:
    """Return two cells: the peak of a client's device, and what of it is not stored there."""
    stored = 0 if name in BASE_AWAY else entry["client"]["weights"][0]
    stored += 0 if name in OPTIMIZER_AWAY else entry["client"]["optimizer"][0]
    return f"{entry['peak'] / 1e6:.0f} MB | {(entry['peak'] - stored) / 1e6:.0f} MB"


def _compared(measured: float, expected: float) -> str:
    """Return a number of bytes and its difference from a formula."""
    difference = 0.0 if measured == expected else measured / expected - 1
    mark = " (!)" if abs(difference) > MOST else ""
    return f"{measured / 1e6:.3f} MB ({difference:+.1%}){mark}"


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
        f"({native / ours:.3f} times as much) in the base64\nof FederatedScope-LLM's own messages, which are "
        "not sent here.\n"
    )


def _with_base(entries: dict[str, dict]) -> dict[str, dict]:
    """Fill in the loss of the base where a method's rounds do not evaluate it: that of the other methods."""
    base = next((entry["loss_before"] for entry in entries.values() if entry["loss_before"]), None)
    return {name: entry | {"loss_before": entry["loss_before"] or base} for name, entry in entries.items()}


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
        tried = sorted((of for of in entries.values() if of["method"] == method), key=lambda of: of["lr"])
        losses = ", ".join(f"{of['lr']:g}: {of['loss_after']:.4f}" for of in tried)
        loss = f"{entry['loss_before']:.4f} | {entry['loss_after']:.4f}"
        partial = ""
        if "partial_after" in entry:
            partial = f"{entry['partial_before']:.4f} -> {entry['partial_after']:.4f}"
        cells = f"{entry['lr']:g} | {losses} | {partial} | {entry['tokens']:,} | {entry['seconds']:.0f} s"
        rows.append(f"| `{method}` | {loss} | {cells} |")
    head = "| method | before | after | best lr | all three | in the rounds | tokens | seconds |"
    return "\n".join([
        f"## {task}: held-out loss per answer token\n",
        "Of the exported adapter in the whole base; for `fedsa`, of clients' own adapters. In its rounds",
        "`fedbiot` evaluates the emulator, which has a column of its own. Tokens are those of all rows of",
        "clients, prompts included; the server of `fedbiot` trains on public rows besides.\n",
        head,
        "| --- | ---: | ---: | ---: | --- | --- | ---: | ---: |",
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
