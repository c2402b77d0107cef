"""bench.json, its page and its plot."""

import statistics
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.compare.measured.plot import draw
from benchmarks.compare.measured.records import CAUSES, Bench, Run
from benchmarks.compare.measured.statistics import (
    Interval,
    differences,
    final_loss,
    first_at,
    loss_by,
    ratio,
    target_of,
)
from benchmarks.compare.results import save
from fedspeed.monitor.tables import table
from fedspeed.units import bytes_text, count_text, loss_text, parameters_text

EQUAL = 1e-5  # losses that differ by no more, in fp32, are those of the same mathematics
GIB = 2**30
WIDTH = 110
NONE = "-"
ROUNDING = """\
Losses are called equal up to 1e-5. Executions of the same mathematics add in different orders, and what that
rounds differently grows from step to step.
"""


def write(bench: Bench, folder: Path) -> None:
    """Write bench.json, bench.md and bench.png into a folder."""
    values = bench.model_dump(mode="json")
    save(folder / "bench.json", {"setting": values["setting"], "runs": values["runs"]})
    (folder / "bench.md").write_text(page(bench), encoding="utf-8")
    if any(run.status == "finished" for run in bench.runs):
        draw(bench, folder / "bench.png")


def page(bench: Bench) -> str:
    """Return the page: what was compared, costs, losses, and what failed or does not fit."""
    setting = bench.setting
    seeds = sorted({run.seed for run in bench.runs})
    where = f"{bench.machine['cores']} cores of {bench.machine['processor']}"
    facts = (
        f"{bench.date}, measured on {where}; torch {bench.machine['torch']}. "
        f"`{setting.config}` with {setting.model} ({parameters_text(setting.parameters)} parameters), "
        f"{setting.clients} clients, seeds {', '.join(map(str, seeds))}. All methods have the same base, "
        "rows, order, tokens and adapter. Values are medians over the seeds. In brackets is how many times "
        "the reference's (the first row) a value is: the geometric mean of the seeds' ratios, with its 95 % "
        "interval. It need not be the quotient of the medians."
    )
    head = f"# Methods side by side\n\n{textwrap.fill(facts, WIDTH)}\n"
    parts = [head, "## Costs\n", _costs(bench), "## Losses\n", _losses(bench), "![curves](bench.png)\n"]
    return "\n".join([*filter(None, parts), *_remarks(bench)])


def _costs(bench: Bench) -> str:
    columns: dict[str, Callable[[Run], float | None]] = {
        "device memory": lambda run: run.device_bytes,
        "host memory, all processes (RSS)": lambda run: run.host_rss,
        "sent in a round, for each client": lambda run: run.sent,
        "first aggregate": lambda run: run.first_aggregate_s,
        "a round": lambda run: run.round_s,
        "answer tokens/s": _tokens_per_s,
    }
    texts: tuple[Callable[[float], str], ...] = (
        bytes_text,
        bytes_text,
        bytes_text,
        _seconds,
        _seconds,
        count_text,
    )
    rows = []
    for name, title in bench.setting.arms.items():
        if found := bench.of(name):
            cells = [
                _compared(column, text, found, bench.of(_reference(bench)))
                for column, text in zip(columns.values(), texts)
            ]
            rows.append([title, *cells, _causes(found)])
    return (
        table(["method", *columns, f"a round by cause: {', '.join(CAUSES)}, other"], rows, range(1, 7)) + "\n"
    )


def _losses(bench: Bench) -> str:
    reference = bench.of(_reference(bench))
    rows = []
    for name, title in bench.setting.arms.items():
        if not (found := bench.of(name)):
            continue
        at_time = {
            s: loss_by(run.curve, reference[s].curve[-1].seconds)
            for s, run in found.items()
            if s in reference
        }
        targets = _targets(bench)
        reached = {s: first_at(run.curve, targets[s]) for s, run in found.items() if s in targets}
        scores = [run.curve[-1].exact for run in found.values()]
        rows.append([
            title,
            _loss_range([final_loss(run) for run in found.values()]),
            _difference(found, reference),
            _loss_range(list(at_time.values())),
            _share(scores),
            *_to_target(
                found,
                reached,
                {s: first_at(r.curve, targets[s]) for s, r in reference.items() if s in targets},
            ),
        ])
    header = [
        "method",
        "held-out loss at equal tokens",
        "largest difference from the reference's: at the first evaluation; later",
        "at equal time",
        "answers exactly right",
        "rounds to the target",
        "seconds to the target",
    ]
    return table(header, rows, range(1, 7)) + f"\n\n{ROUNDING}\n"


def _remarks(bench: Bench) -> list[str]:
    """Return a paragraph for each thing that the tables do not say."""
    found = [
        f"- {run.arm}, seed {run.seed}: failed, {run.reason}" for run in bench.runs if run.status == "failed"
    ]
    cap = bench.setting.cap_gib
    for name, title in bench.setting.arms.items():
        peaks = [run.device_bytes for run in bench.of(name).values() if run.device_bytes]
        if cap is not None and peaks and max(peaks) > cap * GIB:
            found.append(f"- {title} does not fit in {cap:g} GiB: it needs {bytes_text(max(peaks))}.")
    targets = _targets(bench)
    if targets:
        values = sorted(targets.values())
        span = (
            loss_text(values[0])
            if len(set(values)) == 1
            else f"{loss_text(values[0])} to {loss_text(values[-1])}"
        )
        found.append(f"- The target of the held-out loss is {span}.")
    return ["\n".join(found) + "\n"] if found else []


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s"


def _reference(bench: Bench) -> str:
    return next(iter(bench.setting.arms))


def _targets(bench: Bench) -> dict[int, float]:
    """Return the target loss by seed."""
    if bench.setting.target is not None:
        return dict.fromkeys({run.seed for run in bench.runs}, bench.setting.target)
    found = {seed: target_of(run) for seed, run in bench.of(_reference(bench)).items()}
    return {seed: target for seed, target in found.items() if target is not None}


def _tokens_per_s(run: Run) -> float | None:
    last = run.curve[-1]
    return last.tokens / last.seconds if last.seconds else None


def _compared(
    column: Callable[[Run], float | None],
    text: Callable[[float], str],
    found: Mapping[int, Run],
    reference: Mapping[int, Run],
) -> str:
    """Return the median of a value, and its ratio to the reference's."""
    own = {seed: value for seed, run in found.items() if (value := column(run)) is not None}
    others = {seed: value for seed, run in reference.items() if (value := column(run)) is not None}
    if not own:
        return NONE
    median = text(statistics.median(own.values()))
    found_ratio = None if found is reference or own == others else ratio(own, others)
    return f"{median} ({ratio_text(found_ratio)})" if found_ratio else median


def ratio_text(interval: Interval) -> str:
    """Return a ratio with its interval: `2.31x, 2.2 to 2.5`."""
    if interval.low is None or interval.high is None:
        return f"{interval.mean:.3g}x"
    return f"{interval.mean:.3g}x, {interval.low:.3g} to {interval.high:.3g}"


def _causes(found: Mapping[int, Run]) -> str:
    medians = [statistics.median(run.causes[cause] for run in found.values()) for cause in (*CAUSES, "other")]
    return ", ".join(map(_seconds, medians))


def _loss_range(losses: list[float | None]) -> str:
    known = sorted(loss for loss in losses if loss is not None)
    if not known:
        return NONE
    if known[0] == known[-1]:
        return loss_text(known[0])
    return f"{loss_text(statistics.median(known))} ({loss_text(known[0])} to {loss_text(known[-1])})"


def _difference(found: Mapping[int, Run], reference: Mapping[int, Run]) -> str:
    if found == reference:
        return NONE
    pairs = [differences(run, reference[seed]) for seed, run in found.items() if seed in reference]
    known = [pair for pair in pairs if pair]
    if not known:
        return NONE
    first = max(pair[0] for pair in known)
    last = max(max(pair) for pair in known)
    if last <= EQUAL:
        return f"{last:.1e}, equal"
    return f"{first:.1e}{', equal' if first <= EQUAL else ''}; later up to {last:.1e}"


def _share(scores: list[float | None]) -> str:
    known = [score for score in scores if score is not None]
    return f"{100 * statistics.median(known):.0f} %" if known else NONE


def _to_target(found: Mapping[int, Run], reached: Mapping, reference: Mapping) -> tuple[str, str]:
    """Return the rounds and the seconds to the target, with the ratio of the seconds to the reference's."""
    points = {seed: point for seed, point in reached.items() if point is not None}
    if not points:
        return "not reached", "not reached"
    some = "" if len(points) == len(found) else f"{len(points)} of {len(found)} seeds: "
    rounds = statistics.median(point.round for point in points.values())
    seconds = {seed: point.seconds for seed, point in points.items()}
    others = {seed: point.seconds for seed, point in reference.items() if point is not None}
    # Of some seeds only, a ratio would be that of the lucky ones.
    compared = None if some or seconds == others else ratio(seconds, others)
    text = _seconds(statistics.median(seconds.values()))
    return f"{some}{rounds:g}", f"{some}{text}" + (f" ({ratio_text(compared)})" if compared else "")
