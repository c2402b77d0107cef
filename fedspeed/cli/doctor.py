"""`fedspeed doctor`."""

import argparse

from fedspeed.cli.arguments import Commands
from fedspeed.cli.output import say
from fedspeed.errors import EXIT_OK, EXIT_USAGE


def add(commands: Commands) -> None:
    """Add the command and its arguments to the parser."""
    parser = commands.add_parser("doctor", help="say what this machine lacks")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    from fedspeed.cluster.doctor import checks, render

    found = checks()
    say(render(found))
    return EXIT_OK if all(c.ok for c in found) else EXIT_USAGE
