"""`fedspeed bench`: compare methods and systems, by the benchmarks of the repository."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from fedspeed.cli.arguments import Commands
from fedspeed.errors import FedSpeedError

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = "benchmarks.compare"


def add(commands: Commands) -> None:
    """Add the command to the parser. Its arguments are those of the benchmark, which parses them itself."""
    parser = commands.add_parser(
        "bench",
        add_help=False,
        help="compare methods and systems: memory, bytes, seconds by cause, losses (--quick: eight minutes)",
    )
    parser.set_defaults(command=run, passed_on=[])


def run(arguments: argparse.Namespace) -> int:
    """Start the benchmark with the arguments; return its exit code.

    Raises:
        FedSpeedError: FedSpeed was installed without the repository around it.
    """
    if not (ROOT / "benchmarks" / "compare" / "__main__.py").is_file():
        raise FedSpeedError(
            f"fedspeed bench: {ROOT / 'benchmarks'} is missing, which is a part of the repository and not of "
            "the installed package",
            remedy="clone the repository, and run `python -m fedspeed bench` in it",
        )
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", PACKAGE, *arguments.passed_on]
    try:
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode
    except KeyboardInterrupt:
        return 130
