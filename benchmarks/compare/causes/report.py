"""The page and the plot of `causes`, from its JSON."""

import json
import textwrap
from pathlib import Path
from statistics import median
from typing import Any

ABOUT = (
    "FedSpeed's own engine, random weights and rows in fp32, with everything on and with one thing off, by "
    "turns. A ratio is the median of neighbouring pairs, with the least and the most of them: how many times "
    "as long it takes without that thing. Losses are compared in every step; the last column says to which "
    "digit they are equal. Ratios belong to the model of their row: they are no forecast for others, and "
    "their product is not the ratio of all together."
)
WIDTH = 110
TITLE = "# Where the time and the memory go: one thing switched off at a time\n"


def write(path: Path) -> None:
    """Write the Markdown page and the plot beside the JSON."""
    values = json.loads(path.read_text())
    path.with_suffix(".md").write_text(page(values))
    path.with_suffix(".png").write_bytes(plot(values))


def page(values: dict[str, Any]) -> str:
    """Return the page."""
    machine = values["machine"]
    parts = [
        TITLE,
        f"    python -m fedspeed bench causes{' --quick' * values['quick']}\n",
        f"{values['date']}, {machine['cores']} cores of {machine['processor']}, {machine['memory_gib']} GiB, "
        f"torch {machine['torch']}, DeepSpeed {machine['deepspeed']}. Plot: causes.png.\n",
        f"{textwrap.fill(ABOUT, WIDTH)}\n",
        _table(values["causes"]),
    ]
    parts += [f"Not measured: {name}: {reason}.\n" for name, reason in values["not_measured"].items()]
    if values["memory"]:
        parts += ["## Peak device memory\n", _memory(values["memory"])]
    parts += ["## Commands\n", _commands(values)]
    return "\n".join(parts)


def _model(model: dict[str, int] | None) -> str:
    if model is None:
        return ""
    return (
        f"{model['blocks']} blocks of {model['hidden']}, vocabulary {model['vocab']}, {model['micro']} x "
        f"{model['rows']} x {model['tokens']} tokens"
    )


def _table(causes: dict[str, Any]) -> str:
    text = (
        "| part of | on | off | model | seconds on | off | pairs "
        "| ratio (least, most) | losses equal |\n"
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | --- |\n"
    )
    for one in causes.values():
        on, off = (median(one["seconds"][variant]) for variant in ("on", "off"))
        loads = one["loaded"]
        detail = ""
        if any(loads.values()):
            detail = f" (loads {loads['off']:.0f} x the base instead of {loads['on']:.0f})"
        interval = f"**{one['median']:.2f}** ({one['least']:.2f}, {one['most']:.2f})"
        cells = (
            *(one["of"], one["on"], one["off"] + detail, _model(one["model"])),
            *(
                f"{on:.2f}",
                f"{off:.2f} for {one['unit']}",
                str(len(one["seconds"]["on"])),
                interval,
                one["losses"],
            ),
        )
        text += f"| {' | '.join(cells)} |\n"
    return text


def _memory(memory: dict[str, Any]) -> str:
    about = (
        f"{_model(memory['model'])}, base {memory['base'] / 2**20:.0f} MiB. Everything on is the least that "
        "the engine takes: the base streamed from RAM through two block slots, each block computed again, "
        "logits of answer tokens in parts, one micro-batch after the other. Tensors on the device are "
        "counted (benchmarks/memory.py), so a repetition gives the same bytes and there is no interval. "
        "Whether block inputs wait in host RAM (engine.block_inputs) makes a difference on a GPU only."
    )
    text = f"{textwrap.fill(about, WIDTH)}\n\n" + (
        "| | peak MiB | times everything on | losses equal |\n| --- | ---: | ---: | --- |\n"
    )
    for variant, one in memory["rows"].items():
        text += f"| {variant} | {one['peak'] / 2**20:.0f} | **{one['ratio']:.2f}** | {one['losses']} |\n"
    return text


def _commands(values: dict[str, Any]) -> str:
    rows = [*values["causes"].values(), *([values["memory"]] if values["memory"] else [])]
    return "".join(f"    {one['command']}\n" for one in rows)


def plot(values: dict[str, Any]) -> bytes:
    """Return the plot: a bar for each ratio, with the least and the most of its pairs."""
    from fedspeed.monitor.plots import BLUE, GREEN, INK, ORANGE, new_figure, png

    colours = {"throughput": BLUE, "time": GREEN}
    bars = [
        (f"{name}: {one['off']}", one["median"], one["least"], one["most"], colours[one["of"]])
        for name, one in values["causes"].items()
    ]
    for variant, one in (values["memory"] or {"rows": {}})["rows"].items():
        if one["ratio"] != 1.0:
            bars.append((f"memory: {variant}", *[one["ratio"]] * 3, ORANGE))
    bars = bars[::-1]
    figure = new_figure(11.0, 1.0 + 0.42 * len(bars))
    axes = figure.add_subplot(1, 1, 1)
    names, middle, least, most, shades = zip(*bars, strict=True)
    errors = [[m - a for m, a in zip(middle, least)], [b - m for m, b in zip(middle, most)]]
    axes.barh(names, middle, color=shades, xerr=errors, ecolor=INK, capsize=3)
    axes.axvline(1.0, color=INK, linewidth=0.8)
    axes.set_xlabel("times as much with this one thing off (blue throughput, green time, orange memory)")
    return png(figure)
