"""`fedspeed bench measured`, and `fedspeed bench` itself: chosen methods side by side, interleaved."""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.compare.measured.arms import DEFAULT
from benchmarks.compare.results import ROOT, add_folders, keep
from fedspeed.errors import ConfigError

QUICK_CONFIG = Path("ds_configs/quickstart.yaml")
QUICK_BASE = "runs/compare-base"
QUICK_BLOCKS = 6
# Fewer and shorter rounds than the quickstart's, and few held-out rows.
QUICK = (
    f"model.base={QUICK_BASE}",
    "data.max_val_rows=32",
    "federation.rounds=6",
    "federation.evaluate_every=2",
    "train.local_steps=5",
    "engine.threads=1",
)
# Of methods that do not take the common steps, a rate at which the loss falls on this base.
QUICK_SETTINGS = {
    "spry": (
        "train.optimizer=sgd",
        "train.lr=0.001",
        "federation.server_optimizer=none",
        "federation.server_lr=auto",
        "federation.method.perturbations=2",
    )
}
SEEDS = (0, 1, 2)


def add(commands: argparse._SubParsersAction) -> None:
    """Add the part and its arguments to the parser."""
    parser = commands.add_parser(
        "measured",
        help="methods side by side on this machine (what `fedspeed bench` does without a part)",
        description="Run each method with each seed on the same base, rows, order, tokens and adapter, in "
        "turn, and write bench.json, bench.md and bench.png. A run that is there with the same arguments is "
        "not repeated: the same command goes on.",
    )
    parser.add_argument(
        "--config", type=Path, default=QUICK_CONFIG, metavar="YAML", help=f"default: {QUICK_CONFIG}"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the README's table: a base of less than 1 M parameters, pretrained on the spot",
    )
    parser.add_argument(
        "--methods",
        type=_names,
        default=list(DEFAULT),
        metavar="NAME,NAME",
        help=f"the first is the reference of all ratios (default: {','.join(DEFAULT)})",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME:key=value",
        help="a setting of one method only; with a new NAME, of FedSpeed under that name. May be repeated",
    )
    parser.add_argument("--seeds", type=_seeds, default=list(SEEDS), metavar="N,N", help="default: 0,1,2")
    parser.add_argument(
        "--ranks", type=int, default=0, metavar="N", help="local ranks (default: as launch.py chooses)"
    )
    parser.add_argument(
        "--cap", type=float, metavar="GIB", help="device memory; what needs more is reported with its need"
    )
    parser.add_argument(
        "--target",
        type=float,
        metavar="LOSS",
        help="held-out loss to reach (default: 5 %% above the reference's after half of its rounds)",
    )
    add_folders(parser, "measured")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values of all methods")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run what is missing, and write the results; return the exit code.

    Raises:
        ConfigError: a setting of the command that does not go with another, or an unknown method.
    """
    from benchmarks.compare.measured.arms import chosen
    from benchmarks.compare.measured.prepare import more_settings, prepared

    if arguments.quick and arguments.config != QUICK_CONFIG:
        raise ConfigError(
            f"--config={arguments.config}: --quick is of {QUICK_CONFIG}, with settings for it; leave one of "
            "them out"
        )
    _enter_repository(arguments)
    settings = more_settings(arguments.set)
    if arguments.quick:
        for name in QUICK_SETTINGS.keys() & set(arguments.methods):
            settings[name] = [*QUICK_SETTINGS[name], *settings.get(name, ())]
    arms = chosen(arguments.methods, settings)
    bench, plan = prepared(arguments, arms)
    return _run_all(arguments, bench, plan)


def _enter_repository(arguments: argparse.Namespace) -> None:
    """Make the repository the working folder where its own configuration is compared, so that results name
    files relative to it; results go where they would have gone.
    """
    if arguments.config != QUICK_CONFIG or Path.cwd() == ROOT:
        return
    arguments.out = arguments.out.absolute()
    arguments.keep = arguments.keep and arguments.keep.absolute()
    os.chdir(ROOT)


def _run_all(arguments: argparse.Namespace, bench, plan: Sequence[tuple]) -> int:
    from benchmarks.compare.measured.report import write
    from benchmarks.compare.measured.runs import measure

    begin = time.monotonic()
    folder = arguments.out
    for done, (arm, seed, settings) in _with_progress(plan, begin):
        found = measure(arm, seed, config=arguments.config, arguments=settings, folder=folder / "runs")
        bench = bench.model_copy(update={"runs": (*bench.runs, found)})
        write(bench, folder)
        print(f"[{done} of {len(plan)}] {arm.name}, seed {seed}: {_outcome(found)}", flush=True)
    write(bench, folder)
    keep(folder / "bench.json", arguments.keep)
    print((folder / "bench.md").read_text(encoding="utf-8"))
    print(f"{folder}/bench.json, bench.md, bench.png; {time.monotonic() - begin:.0f} s")
    return int(any(run.status == "failed" for run in bench.runs))


def _with_progress(plan: Sequence[tuple], begin: float) -> Iterator[tuple[int, tuple]]:
    """Yield each run with its number, and print what is about to run and how long all will take."""
    for number, entry in enumerate(plan, 1):
        passed = time.monotonic() - begin
        left = f", about {passed / (number - 1) * (len(plan) - number + 1):.0f} s left" if number > 1 else ""
        print(
            f"[{number} of {len(plan)}] {entry[0].name}, seed {entry[1]} ({passed:.0f} s{left})", flush=True
        )
        yield number, entry


def _outcome(run) -> str:
    if run.status == "failed":
        return f"failed: {run.reason}"
    loss = run.curve[-1].loss if run.exported_loss is None else run.exported_loss
    shown = "-" if loss is None else f"{loss:.4f}"
    return f"{run.round_s:.2f} s a round, held-out loss {shown}"


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _seeds(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
