"""The page and the plot of `scale`, from its JSON."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedspeed.monitor.tables import table

WIDTH = 110
KINDS = {"processes": "processes", "hosts": "hosts of scale16"}


def write(path: Path) -> None:
    """Write the Markdown page and the plot beside the JSON."""
    values = json.loads(path.read_text())
    path.with_suffix(".md").write_text(page(values))
    path.with_suffix(".png").write_bytes(plot(values))


def page(values: dict[str, Any]) -> str:
    """Return the page."""
    machine = values["machine"]
    update = values["update_bytes"][0] / 1e3
    parts = [
        "# Rounds of few and of many clients\n\n    python -m fedspeed bench scale\n",
        f"{values['date']}, {machine['cores']} cores of {machine['processor']}, {machine['memory_gib']} GiB, "
        f"torch {machine['torch']}, DeepSpeed {machine['deepspeed']}. Plot: scale.png.\n",
        "## Measured\n",
        "A process for each client, all on this machine, forked from one; and sixteen clients on the nine "
        "hosts of hostfiles/scale16, network namespaces with links of 10 Gbit/s, started by DeepSpeed's "
        f"launcher. Real training of a tiny Llama (2 blocks of 64), an update of {update:.0f} kB, ten steps "
        "a round. All share the cores: so seconds grow with the clients, and CPU-seconds of a client are "
        "what compares: of its main thread, which trains, and of all others, which exchange. `plain` sums in "
        "the clear, `mix+mask` masked over relays, which is the default. Bytes and memory are those of one "
        "client; the bytes are what it hands to the transport, in brackets what its host's link carried, "
        "packets' heads included. A round is bound by its fullest resource; beside it is the share of the "
        "median round for which the resource was busy, on average over other rounds, so that it may exceed "
        "100 %.\n",
        _measured(values["measured"]),
    ]
    parts += [f"Not measured: {kind}: {reason}.\n" for kind, reason in values["not_measured"].items()]
    parts += [
        "## The formula at the measured points\n",
        "`fedspeed simulate` predicts the bytes and CPU-seconds of an exchange (planner/many_clients.py). "
        "Neither includes training.\n",
        _checked(values),
        f"Least squares over the masked points: {1e3 * values['fitted_member_s']:.1f} ms of CPU for each "
        "other participant and round, beside the messages; the formula has "
        f"{1e3 * values['member_s']:.1f} ms.\n"
        if values["fitted_member_s"] is not None
        else "",
        "## Simulated\n",
        f"{values['simulated_model']}, each client on a server like the slowest of hostfiles/hetero10, links "
        "of 10 Gbit/s: the planner's model of time and the formula above. Nothing here was measured. "
        "Masked bytes grow with the square of the clients, as everybody lists all cells for everybody.\n",
        _simulated(values["simulated"]),
    ]
    return "\n".join(map(_wrapped, filter(None, parts)))


def _wrapped(part: str) -> str:
    """Return a paragraph in lines of the page's width; a table or a heading as it is."""
    if part.startswith(("|", "#")) or len(part) <= WIDTH:
        return part
    return textwrap.fill(part, WIDTH, break_long_words=False, break_on_hyphens=False) + "\n"


def _numbers(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first two columns are text, and a line break."""
    return table(head, rows, range(2, len(head))) + "\n"


def _measured(points: list[dict[str, Any]]) -> str:
    head = (
        *(
            "where",
            "mode",
            "clients",
            "round s",
            "compute s",
            "exchange s",
            "idle s",
            "CPU-s main",
            "CPU-s exchange",
        ),
        *("busy cores", "kB sent", "PSS MB", "RSS MB", "bound by"),
    )
    rows = []
    for p in sorted(points, key=lambda p: (p["kind"] != "processes", p["mode"] != "plain", p["clients"])):
        wire = f" ({p['link_bytes'] / 1e3:.0f})" if p["link_bytes"] else ""
        rows.append([
            *(KINDS[p["kind"]], p["mode"], str(p["clients"])),
            *(f"{p[name]:.2f}" for name in ("seconds", "compute_s", "exchange_s", "idle_s")),
            *(f"{p['cpu_training_s']:.3f}", f"{p['cpu_exchange_s']:.3f}", f"{p['busy_cores']:.1f}"),
            f"{p['bytes_sent'] / 1e3:.0f}{wire}",
            *(f"{p['pss'] / 1e6:.0f}", f"{p['rss'] / 1e6:.0f}"),
            f"{p['bound']}, {p['bound_share']:.0%}",
        ])
    return _numbers(head, rows)


def _checked(values: dict[str, Any]) -> str:
    formula = {(f["clients"], f["mode"]): f for f in values["formula"]}
    head = (
        *("where", "mode", "clients", "kB measured", "kB formula", "off"),
        *("CPU-s measured", "CPU-s formula", "off"),
    )
    rows = []
    for p in values["measured"]:
        f = formula[p["clients"], p["mode"]]
        rows.append([
            *(KINDS[p["kind"]], p["mode"], str(p["clients"])),
            *(
                f"{p['bytes_sent'] / 1e3:.0f}",
                f"{f['sent'] / 1e3:.0f}",
                f"{f['sent'] / p['bytes_sent'] - 1:+.0%}",
            ),
            *(f"{p['cpu_exchange_s']:.3f}", f"{f['cpu']:.3f}", f"{f['cpu'] / p['cpu_exchange_s'] - 1:+.0%}"),
        ])
    return _numbers(head, rows)


def _simulated(points: list[dict[str, Any]]) -> str:
    head = (
        *("clients", "mode", "round s", "training s", "exchange s", "staleness 1, round s", "CPU-s a client"),
        *("MB sent a client", "bound by"),
    )
    rows = []
    for s in points:
        train = f"{s['train']:.1f}"
        plain = s["train"] + s["plain"], max(s["train"], s["plain"])
        name = f"{s['clients']:,}"
        rows += [
            [name, "plain", f"{plain[0]:.1f}", train, f"{s['plain']:.2f}", f"{plain[1]:.1f}", ""]
            + [f"{s['plain_sent'] / 1e6:.0f}", s["plain_bound"]],
            [name, "mix+mask", f"{s['round']:.1f}", train, f"{s['masked']:.2f}", f"{s['hidden']:.1f}"]
            + [f"{s['masked_cpu']:.1f}", f"{s['sent'] / 1e6:.0f}", s["masked_bound"]],
        ]
    return _numbers(head, rows)


def plot(values: dict[str, Any]) -> bytes:
    """Return the plot: measured points are filled, the formula and simulated ones are hollow and dashed."""
    from fedspeed.monitor.plots import BLUE, ORANGE, new_figure, png

    colours = {"plain": BLUE, "mix+mask": ORANGE}
    simulated = values["simulated"]
    figure = new_figure(14.0, 4.6)
    panels: list[tuple[str, str, str | None]] = [
        ("seconds of a round", "seconds", None),
        ("CPU-seconds of the exchange, a client and round", "cpu_exchange_s", "cpu"),
        ("bytes sent, a client and round", "bytes_sent", "sent"),
    ]
    for place, (title, name, of_formula) in enumerate(panels, 1):
        axes = figure.add_subplot(1, 3, place)
        for mode, colour in colours.items():
            for kind, mark in (("processes", "o"), ("hosts", "s")):
                found = sorted(
                    (p["clients"], p[name])
                    for p in values["measured"]
                    if (p["mode"], p["kind"]) == (mode, kind)
                )
                if found:
                    label = f"{mode}, measured, {KINDS[kind]}"
                    axes.plot(*zip(*found), mark + "-", color=colour, label=label)
            if of_formula:
                found = sorted((f["clients"], f[of_formula]) for f in values["formula"] if f["mode"] == mode)
                label = f"{mode}, formula, the same update"
                axes.plot(*zip(*found), "^--", color=colour, markerfacecolor="white", label=label)
            big = [(s["clients"], _simulated_value(s, mode, name)) for s in simulated]
            label = f"{mode}, simulated, 1.5B on servers"
            axes.plot(*zip(*big), "D:", color=colour, markerfacecolor="white", label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("clients")
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=6.5)
    return png(figure)


def _simulated_value(one: dict[str, Any], mode: str, name: str) -> float:
    if mode == "plain":
        own = {
            "seconds": one["train"] + one["plain"],
            "bytes_sent": one["plain_sent"],
            "cpu_exchange_s": one["plain_cpu"],
        }
    else:
        own = {"seconds": one["round"], "bytes_sent": one["sent"], "cpu_exchange_s": one["masked_cpu"]}
    return own[name]
