"""`fedspeed bench outside`: the same task, to the same losses, under FedSpeed and under other systems."""

import argparse

from benchmarks.compare.results import ROOT, add_folders

SCRATCH = ROOT / "runs" / "bench"
CHOICES = ("flower-simulation", "flower-deployment", "nvflare", "appfl", "accelerate", "roundpipe")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the part and its arguments."""
    parser = commands.add_parser(
        "outside",
        help="the same task under Flower, NVFlare, APPFL, and accelerate",
        description="Train the same task to the same losses under FedSpeed, a plain loop and other systems, "
        "all in turn in each repetition. Environments are made once in runs/bench/envs. A command that "
        "was interrupted goes on. Exit code 1: losses differ, or something failed.",
    )
    parser.add_argument(
        "--systems",
        type=_systems,
        default=CHOICES,
        metavar="NAME,NAME",
        help=f"besides FedSpeed and the plain loop (default: {','.join(CHOICES)})",
    )
    parser.add_argument("--repeat", type=int, default=3, help="repetitions (default: 3)")
    parser.add_argument(
        "--limit", type=float, default=600.0, metavar="SECONDS", help="of a run (default: 600)"
    )
    add_folders(parser, "outside")
    parser.set_defaults(command=run)


def _systems(text: str) -> tuple[str, ...]:
    names = tuple(filter(None, text.split(",")))
    if unknown := sorted(set(names) - set(CHOICES)):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(CHOICES)}")
    return names


def run(arguments: argparse.Namespace) -> int:
    """Measure, write the results, and print the table."""
    from benchmarks.compare.outside.command import compare

    return compare(arguments)
