"""memory.json, its page and its plot."""

from pathlib import Path

from benchmarks.compare.measured.plot import line_style
from benchmarks.compare.measured.statistics import final_loss
from benchmarks.compare.memory.records import Memory, Size
from benchmarks.compare.results import save
from fedspeed.monitor.plots import DPI, INK, new_figure
from fedspeed.monitor.tables import table
from fedspeed.units import bytes_text, loss_text, parameters_text

GIB = 2**30
HEAD = """\
# Device memory of a local step, method by method

{date}, {cores} cores of {processor}, torch {torch}: `fedspeed bench memory`. One client, one row of {tokens}
tokens, LoRA of rank 8 on queries and values, bf16, drawn weights. Device memory is the peak of all tensors
that would be on the device of the client (not of a method's server), without the driver's own. In brackets:
how many times that of {reference}.
"""


def write(memory: Memory, folder: Path) -> None:
    """Write memory.json, memory.md and memory.png into a folder."""
    values = memory.model_dump(mode="json", exclude={"date", "machine"})
    save(folder / "memory.json", values)
    (folder / "memory.md").write_text(page(memory), encoding="utf-8")
    draw(memory, folder / "memory.png")


def page(memory: Memory) -> str:
    """Return the page: a row a method, a column a model."""
    reference = next(iter(memory.titles))
    facts = {name: memory.machine[name] for name in ("cores", "processor", "torch")}
    head = HEAD.format(
        date=memory.date, tokens=f"{memory.tokens:,}", reference=memory.titles[reference], **facts
    )
    sizes = sorted(memory.sizes, key=lambda size: size.parameters)
    columns = [f"{parameters_text(size.parameters)}, {size.blocks} blocks" for size in sizes]
    rows = [
        [title, *(_cell(size, name, reference) for size in sizes), _loss(sizes[-1], name)]
        for name, title in memory.titles.items()
    ]
    header = ["method", *columns, "held-out loss after the step, largest model"]
    parts = [head, table(header, rows, range(1, len(header))), "", "![memory against depth](memory.png)", ""]
    return "\n".join([*parts, *_remarks(memory, sizes)])


def _cell(size: Size, name: str, reference: str) -> str:
    own = size.device_bytes(name)
    other = size.device_bytes(reference)
    if own is None:
        return "-"
    return bytes_text(own) + (f" ({own / other:.2f}x)" if other and name != reference else "")


def _loss(size: Size, name: str) -> str:
    run = next((run for run in size.runs if run.arm == name and run.status == "finished"), None)
    return loss_text(final_loss(run)) if run else "-"


def _remarks(memory: Memory, sizes: list[Size]) -> list[str]:
    failed = [
        f"- {memory.titles.get(run.arm, run.arm)}, {size.blocks} blocks of {size.hidden}: {run.reason}"
        for size in sizes
        for run in size.runs
        if run.status == "failed"
    ]
    too_large = [
        f"- {title} does not fit in {memory.cap_gib:g} GiB with {size.blocks} blocks of {size.hidden}: it "
        f"needs {bytes_text(own)}."
        for size in sizes
        for name, title in memory.titles.items()
        if (own := size.device_bytes(name)) and own > memory.cap_gib * GIB
    ]
    return ["\n".join([*failed, *too_large]) + "\n"] if failed or too_large else []


def draw(memory: Memory, path: Path) -> None:
    """Draw each method's memory against the number of blocks, for the models of one width."""
    figure = new_figure(8.0, 5.0)
    axes = figure.subplots()
    width = min(size.hidden for size in memory.sizes)
    sizes = sorted((size for size in memory.sizes if size.hidden == width), key=lambda size: size.blocks)
    for number, (name, title) in enumerate(memory.titles.items()):
        known = [(size.blocks, own / GIB) for size in sizes if (own := size.device_bytes(name))]
        axes.plot(
            *zip(*known), marker="o", markersize=4, label=title, **line_style(number)
        ) if known else None
    axes.set_xlabel(f"decoder blocks of hidden size {width}")
    axes.set_ylabel("peak memory of a client's device [GiB]")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, labelcolor=INK)
    figure.savefig(path, dpi=DPI)
