"""The page and the plots of benchmarks/learning.py, from whatever results are there.

The numbers behind the page are kept beside it, in results/learning/TASK, so that tasks can be measured one
after another, on different machines.
"""

import json
import os
import platform
import shutil
from datetime import date
from pathlib import Path

from benchmarks.learning import TASKS
from benchmarks.learning_losses import FOLDER as LOSSES
from benchmarks.learning_scores import FOLDER as SCORES
from fedspeed.evaluation.compare_runs import comparison_text, read_model
from fedspeed.monitor.plots import BLUE, GREEN, GREY, ORANGE, new_figure, png

REMARKS = "## Remarks"
NUMBERS = "learning"
MACHINE_FILE = "machine.txt"
# Of a task's folder: what the page is made from.
KEPT = (f"{LOSSES}/*.json", f"{SCORES}/*.json", "federated/rounds.jsonl", "centralised/rounds.jsonl")
HEAD = """# What SmolLM2-135M-Instruct learns on the three tasks

bf16, one thread, other work on the machine at the same time.

    python benchmarks/learning.py gsm8k|dolly|codealpaca; python benchmarks/learning.py scores
    python benchmarks/learning.py report

Settings: ds_configs/TASK_smol.yaml. Each client alone takes the steps that it takes in the federation; the
centralised run takes as many steps, each on as many rows as all clients' steps together;
centralised-short-steps takes steps of a client's size, so as many more. All have the same learning rate and
schedule; a server optimizer only the federation. Losses are per answer token on the held-out rows of all
clients, computed by transformers and PEFT from the exported adapters."""


def write_report(out: Path, results: Path) -> None:
    """Write learning.md, learning-TASK.png and the numbers behind them for each task with results, and draw
    the other tasks from the numbers that are kept.

    Args:
        out: folder with the results of the tasks. results: folder to write to.
    """
    numbers = results / NUMBERS
    for task in TASKS:
        if (out / task / LOSSES).is_dir():
            keep_numbers(out / task, numbers / task)
    page = results / "learning.md"
    earlier = page.read_text() if page.exists() else ""
    remarks = earlier[earlier.index(REMARKS) :] if REMARKS in earlier else f"{REMARKS}\n"
    sections = [section for task in TASKS if (section := _section(task, numbers / task, results))]
    page.write_text("\n\n".join([HEAD, *sections, remarks.rstrip()]) + "\n")


def keep_numbers(folder: Path, kept: Path) -> None:
    """Replace the numbers that are kept of a task by those of a folder with results, and note the machine.

    Paths of the models that were scored are left out.
    """
    shutil.rmtree(kept, ignore_errors=True)
    for pattern in KEPT:
        for path in folder.glob(pattern):
            target = kept / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    for path in (kept / SCORES).glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"target": {}}, indent=1) + "\n")
    (kept / MACHINE_FILE).write_text(_machine())


def _machine() -> str:
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    return f"{date.today()}, {os.cpu_count()} cores ({processor})\n"


def losses_of(folder: Path) -> dict[str, list[dict]]:
    """Return the held-out losses of a task by model, base first (`learning_losses.evaluate`)."""
    paths = sorted((folder / LOSSES).glob("*.json"), key=lambda path: _place(path.stem))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def _place(model: str) -> tuple[int, int, str]:
    """Return the place of a model: base, federated, each client alone, then the centralised ones."""
    kind, _, number = model.partition("-")
    kinds = ("base", "federated", "client", "centralised")
    return kinds.index(kind), int(number) if kind == "client" else 0, model


def mean_loss(table: list[dict]) -> float:
    """Return the loss per answer token over all entries of a table of losses."""
    return sum(entry["loss"] for entry in table) / sum(entry["tokens"] for entry in table)


def _section(task: str, folder: Path, results: Path) -> str:
    losses = losses_of(folder)
    if not losses:
        return ""
    groups = [(entry["client"], entry["category"]) for entry in losses["base"]]
    heads = [category or f"client {client}" for client, category in groups]
    lines = [
        f"## {task}",
        "",
        (folder / MACHINE_FILE).read_text().rstrip(),
        "",
        f"| model | all | {' | '.join(heads)} |",
        "| --- |" + " ---: |" * (len(heads) + 1),
    ]
    for model, table in losses.items():
        values = [f"{entry['loss'] / entry['tokens']:.3f}" for entry in table]
        lines.append(f"| {model} | {mean_loss(table):.4f} | {' | '.join(values)} |")
    _plot(task, folder, losses, results)
    lines += ["", f"![losses](learning-{task}.png)"]
    for name in dict.fromkeys(path.stem.partition("-")[0] for path in (folder / SCORES).glob("*.json")):
        paths = sorted((folder / SCORES).glob(f"{name}-*.json"))
        lines += ["", comparison_text([read_model(str(path)) for path in paths])]
    return "\n".join(lines)


def _plot(task: str, folder: Path, losses: dict[str, list[dict]], results: Path) -> None:
    """Draw bars of the loss by client or category for base, mean client alone, federated and centralised, and
    the curves over rounds of the federated and the centralised run.
    """
    base = losses["base"]
    heads = [entry["category"] or f"client {entry['client']}" for entry in base]
    alone = [table for model, table in losses.items() if model.startswith("client-")]
    bars = {"base": ([entry["loss"] / entry["tokens"] for entry in base], GREY)}
    if alone:
        count = len(alone)
        bars["mean client alone"] = (
            [sum(t[i]["loss"] / t[i]["tokens"] for t in alone) / count for i in range(len(base))],
            ORANGE,
        )
    for model, colour in (("federated", GREEN), ("centralised", BLUE)):
        if model in losses:
            bars[model] = ([entry["loss"] / entry["tokens"] for entry in losses[model]], colour)
    figure = new_figure(12.0, 4.2)
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [2.2, 1]})
    width = 0.8 / len(bars)
    for number, (name, (values, colour)) in enumerate(bars.items()):
        positions = [i + (number - (len(bars) - 1) / 2) * width for i in range(len(values))]
        left.bar(positions, values, width=width, color=colour, label=name)
    left.set_xticks(range(len(heads)), heads, rotation=20, ha="right")
    left.set_title(f"{task}: held-out loss per answer token", loc="left", fontsize=10)
    left.legend(frameon=False, fontsize=9)
    for model, colour in (("federated", GREEN), ("centralised", BLUE)):
        path = folder / model / "rounds.jsonl"
        if path.exists():
            records = [json.loads(line) for line in path.read_text().splitlines()]
            shown = [(record["round"], record["val_loss"]) for record in records if record.get("val_loss")]
            right.plot(*zip(*shown), color=colour, marker="o", markersize=4, label=model)
    right.set_xlabel("round")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set_title("held-out loss over rounds", loc="left", fontsize=10)
    if right.has_data():
        right.legend(frameon=False, fontsize=9)
    results.mkdir(parents=True, exist_ok=True)
    (results / f"learning-{task}.png").write_bytes(png(figure))
