"""The arguments of `fedspeed bench`: without a part it compares methods side by side (`measured`)."""

import argparse
from collections.abc import Sequence
from importlib import import_module

from fedspeed.errors import FedSpeedError

# A part is a module or a package with `add(commands)`; it imports what it needs when it runs.
PARTS: tuple[str, ...] = (
    "measured",
    "memory",
    "simulated",
    "emulated",
    "scale",
    "outside",
    "claims",
    "causes",
)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all parts."""
    top = argparse.ArgumentParser(
        prog="fedspeed bench",
        description="Compare methods and systems on the same base, rows, order, tokens and adapter. Without "
        "PART: measured. Results go to runs/bench/ as JSON, Markdown and plots.",
    )
    commands = top.add_subparsers(metavar="PART", required=True)
    for part in PARTS:
        import_module(f"benchmarks.compare.{part}").add(commands)
    return top


def main(argv: Sequence[str]) -> int:
    """Run one part; return the exit code."""
    names = argv[:1]
    if not names or (names[0] not in PARTS and names[0] not in {"-h", "--help"}):
        argv = ["measured", *argv]
    arguments = parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except FedSpeedError as error:
        print(error, flush=True)
        return error.exit_code
