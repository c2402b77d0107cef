"""`fedspeed bench simulated`: five models and three tasks on machines that are not here, every method by a
step model, and a search for the settings in which FedSpeed's advantage is largest. Nothing is trained.
"""

import argparse
from pathlib import Path

from benchmarks.compare.results import ROOT, add_folders


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the part and its arguments."""
    parser = commands.add_parser(
        "simulated",
        help="memory, seconds by cause and tokens/s of every method on machines that are not here",
        description="Memory, seconds of a step by cause, exchange, round and epoch of every method for five "
        "models and three tasks, by a model of time and memory, and a search for the settings in which "
        "FedSpeed's advantage over each baseline is largest. Takes about two minutes of one core.",
    )
    parser.add_argument("--hostfile", type=Path, default=ROOT / "hostfiles" / "hetero10")
    parser.add_argument("--cap", type=float, metavar="GIB", help="memory of every card, at most")
    parser.add_argument("--rows", type=int, default=16, help="of a local step, on each rank (default: 16)")
    parser.add_argument("--tokens", type=int, default=512, help="of a row (default: 512)")
    parser.add_argument("--no-search", action="store_true", help="leave the search out")
    add_folders(parser, "simulated")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Simulate, write the results, and print the table."""
    from benchmarks.compare.simulated.command import simulate

    return simulate(arguments)
