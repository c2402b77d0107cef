"""The page of the emulated comparison, from the values of its JSON. Pure."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

Values = Mapping[str, Any]
OWN = "fedspeed"
HEAD = """# FedSpeed beside other methods, emulated with timed compute

The real program on virtual hosts whose links have 10 Gbit/s (docs/virtual-cluster.md): launcher, ranks,
rounds, exchange, barriers, journal, messages, and updates of the real model's size are real. **Compute is
timed**: a rank sleeps for the seconds that the simulator gives for its cards (benchmarks/compare/simulated),
and there are no base weights; one rank stands for all cards of its client. All hosts share this machine's
cores, so that what the program itself computes (sums, masks, encoding) takes more of a round than on ten
machines; the CPU-seconds of all ranks together are beside it. Evaluations take no time.

Emulated columns are measured on this machine, medians over the counted rounds; bytes are those of a host's
network interface, the mean over hosts (with staleness 1 rounds overlap, and are not told apart). Simulated
columns are the simulator's for the same rows and local steps. Off: the emulated round over the simulated one.
Times FedSpeed: a method's round over that of `fedspeed` (masked sum through two relays), once from emulated
rounds and once from simulated ones. The journal and a server's steps (FedBiOT) are in no column of their own.
Where a method does not fit its cards, the run shows what it would take on larger ones.
"""
COLUMNS = (
    "method",
    "emulated: round s",
    "compute s",
    "exchange s",
    "idle s",
    "sent MB a host",
    "CPU s",
    "tokens/s",
    "simulated: round s",
    "exchange s",
    "off",
    "times FedSpeed, emulated",
    "simulated",
    "",
)


def page(values: Values) -> str:
    """Return the page."""
    groups: dict[tuple, list[Values]] = {}
    for run in values["runs"]:
        groups.setdefault(tuple(run[key] for key in GROUPED), []).append(run)
    machine = values["machine"]
    where = (
        f"{values['date']}, `fedspeed bench emulated`, {machine['cores']} cores ({machine['processor']}).\n"
    )
    return "\n".join([HEAD, where, *(_group(runs) for runs in groups.values())])


GROUPED = ("model", "devices", "clients", "rows_a_rank", "tokens", "local_steps", "time_scale")


def _group(runs: Sequence[Values]) -> str:
    first = runs[0]
    scale = f", sleeps times {first['time_scale']:g}, links as much slower" * (first["time_scale"] != 1)
    title = (
        f"## {first['model'].rpartition('/')[2]}, {first['clients']} clients, {first['local_steps']} local "
        f"steps of {first['rows_a_rank']} rows of {first['tokens']} tokens on each card{scale}\n"
    )
    own = next((run for run in runs if run["way"] == OWN), None)
    head = [f"| {' | '.join(COLUMNS)} |", "| --- |" + " ---: |" * (len(COLUMNS) - 2) + " --- |"]
    return "\n".join([title, *head, *(_line(run, own) for run in runs), ""])


def _line(run: Values, own: Values | None) -> str:
    emulated = run["emulated"]
    simulated = run["simulated"]
    ratios = ["", ""]
    if own is not None:
        ratios = [f"{run[kind]['round'] / own[kind]['round']:.2f}" for kind in ("emulated", "simulated")]
    cells = [
        ", ".join([run["way"], *run["settings"]]),
        f"{emulated['round']:.2f}",
        f"{emulated['compute']:.2f}",
        f"{emulated['exchange']:.2f}",
        f"{emulated['idle']:.2f}",
        f"{mean(emulated['sent'].values()) / 1e6:.1f}" if emulated["sent"] else "-",
        f"{emulated['cpu']:.1f}" if emulated["sent"] else "-",
        f"{run['round_tokens'] / emulated['round'] * run['time_scale']:,.0f}",
        f"{simulated['round']:.2f}",
        f"{simulated['exchange']:.3f}",
        f"{emulated['round'] / simulated['round'] - 1:+.1%}",
        *ratios,
        f"does not fit: {run['shortage']}" if run["shortage"] else "",
    ]
    return f"| {' | '.join(cells)} |"
