"""`fedspeed doctor`: print what this machine lacks."""

import argparse

from fedspeed.cli.arguments import Commands
from fedspeed.cli.output import print_result
from fedspeed.errors import EXIT_OK, EXIT_USAGE


def add(commands: Commands) -> None:
    """Add the command and its arguments to the parser."""
    parser = commands.add_parser("doctor", help="say what this machine lacks")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the results of all checks; return the exit code."""
    from fedspeed.cluster.doctor import checks, render

    results = checks()
    print_result(render(results))
    return EXIT_OK if all(check.ok for check in results) else EXIT_USAGE
