"""`fedspeed pretrain-base`: pretrain the quickstart's tiny base model."""

import argparse

from fedspeed.cli.arguments import Commands, file_name, seed
from fedspeed.cli.packages import need_packages
from fedspeed.errors import EXIT_OK


def add(commands: Commands) -> None:
    """Add the command and its arguments to the parser."""
    parser = commands.add_parser(
        "pretrain-base", help="pretrain the quickstart's tiny base model on the spot"
    )
    parser.add_argument("folder", type=file_name, help="where to write it (skipped if it is there already)")
    parser.add_argument("--seed", type=seed, default=0)
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Pretrain the model."""
    from fedspeed.quickstart import pretrain

    need_packages()
    pretrain(arguments.folder, arguments.seed)
    return EXIT_OK
