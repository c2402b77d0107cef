"""`fedspeed probe`: measure what this machine can do."""

import argparse
from pathlib import Path

from fedspeed.cli.arguments import Commands, file_name
from fedspeed.cli.output import print_result
from fedspeed.errors import EXIT_OK, PlanError


def add(commands: Commands) -> None:
    """Add the command and its arguments to the parser."""
    parser = commands.add_parser("probe", help="measure what this machine can do, for `plan --probe`")
    parser.add_argument("--out", type=file_name, metavar="FILE", help="where to write it (default: stdout)")
    parser.add_argument(
        "--disk",
        type=Path,
        default=Path(),
        metavar="FOLDER",
        help="folder on the disk to measure (default: this one)",
    )
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the measurements, or write them to a file."""
    import json

    from fedspeed.engine.probe import probe

    if not arguments.disk.is_dir():
        raise PlanError(f"--disk={arguments.disk}: no such folder; name one on the disk to be measured")
    try:
        text = json.dumps(probe(arguments.disk.resolve()), indent=1)
    except OSError as error:
        raise PlanError(
            f"--disk={arguments.disk}: cannot be measured ({error.strerror}); name a folder on a disk with "
            "room to write"
        ) from error
    if arguments.out:
        from fedspeed.files import write_atomically

        write_atomically(arguments.out, f"{text}\n".encode())
    else:
        print_result(text)
    return EXIT_OK
