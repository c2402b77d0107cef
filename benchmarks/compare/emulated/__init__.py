"""`fedspeed bench emulated`: rounds of the real program on the virtual hosts of hetero10, with limited links
and timed compute. The launcher, ranks, rounds, exchange, barriers, journal, messages and updates of the big
model's size are real; a rank sleeps for the seconds that the simulator gives for its cards instead of
computing.
"""

import argparse
from pathlib import Path

from benchmarks.compare.results import ROOT, add_folders


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the part and its arguments."""
    parser = commands.add_parser(
        "emulated",
        help="rounds of the real program on virtual hosts with limited links, with timed compute",
        description="Rounds of the real program on the virtual hosts of a hostfile, with links of their "
        "bandwidth, and sleeps in place of arithmetic, beside what the simulator says. Needs root and "
        "network namespaces (docs/virtual-cluster.md). Runs that are in the results are not repeated.",
    )
    parser.add_argument("--hostfile", type=Path, default=ROOT / "hostfiles" / "hetero10")
    parser.add_argument("--model", default="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B")
    parser.add_argument("--clients", type=int, default=9)
    parser.add_argument("--way", action="append", help="one of the methods; several: once for each")
    parser.add_argument("--rows", type=int, default=4, help="of a local step, on each card (default: 4)")
    parser.add_argument("--tokens", type=int, default=512, help="of a row (default: 512)")
    parser.add_argument("--local-steps", type=int, default=2, help="of a round (default: 2)")
    parser.add_argument("--rounds", type=int, default=4, help="of a run; the first is not counted")
    parser.add_argument(
        "--time-scale",
        type=float,
        default=1.0,
        help="factor of all sleeps; links are as much slower, so that ratios stay (default: 1)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key=value",
        help="a setting of the ways; may be repeated",
    )
    parser.add_argument("--launcher", choices=("pdsh", "openmpi"), default="pdsh")
    parser.add_argument("--again", action="store_true", help="repeat runs that are in the results")
    add_folders(parser, "emulated")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Make the runs that are missing, write the results after each of them, and print the table."""
    from benchmarks.compare.emulated.command import emulate

    return emulate(arguments)
