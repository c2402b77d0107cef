"""`fedspeed config-reference`: print the meaning of every configuration key (docs/config.md)."""

import argparse

from fedspeed.cli.arguments import Commands, file_name
from fedspeed.cli.output import print_result
from fedspeed.errors import EXIT_OK


def add(commands: Commands) -> None:
    """Add the command and its arguments to the parser."""
    parser = commands.add_parser(
        "config-reference", help="print what every key of a configuration means (docs/config.md)"
    )
    parser.add_argument("--out", type=file_name, metavar="FILE", help="where to write it (default: stdout)")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the reference, or write it."""
    from fedspeed.config.reference import markdown
    from fedspeed.files import write_atomically

    if arguments.out:
        write_atomically(arguments.out, markdown().encode())
    else:
        print_result(markdown().rstrip())
    return EXIT_OK
