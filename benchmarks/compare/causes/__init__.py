"""`causes`: what each part of FedSpeed contributes to its ratios, by switching one thing off at a time."""

import argparse

from benchmarks.compare.results import add_folders


def add(commands: argparse._SubParsersAction) -> None:
    """Add the part and its arguments."""
    parser = commands.add_parser(
        "causes",
        help="where the ratios come from: one thing switched off at a time",
        description="FedSpeed's own engine with everything on, and with one thing off, in turn and on the "
        "same rows: seconds of a step or a round, and peak device memory. Pipelines over hosts need root. "
        "Minutes on two cores; --quick is a check that all works.",
    )
    parser.add_argument("--only", default="", help="names of causes with commas between them (default: all)")
    parser.add_argument("--repeat", type=int, default=5, help="pairs of each cause, at least 3")
    parser.add_argument("--quick", action="store_true", help="smaller models, 3 pairs, no pipelines")
    add_folders(parser, "causes")
    parser.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> int:
    from benchmarks.compare.causes.run import run

    return run(arguments)
