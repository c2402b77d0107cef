"""`fedspeed export`: a folder of a trained model that others can load."""

import argparse

from fedspeed.cli.arguments import Commands, file_name
from fedspeed.cli.output import print_result
from fedspeed.cli.packages import need_packages
from fedspeed.errors import EXIT_OK


def add(commands: Commands) -> None:
    """Add the command and its arguments to the parser."""
    parser = commands.add_parser(
        "export",
        help="write what a finished run has trained for others: an adapter, or merged with its base",
        description="Write a folder with the weights, the tokenizer, the chat template that was trained "
        "with, and a model card with the run's data counts, method, privacy mode and scores. An adapter "
        "names its base so that others find it.",
    )
    parser.add_argument(
        "run", metavar="RUN", help="name of a run in runs/, its folder, or an exported adapter/ or model/"
    )
    parser.add_argument(
        "--merged",
        action="store_true",
        help="merge the adapter into its base: a folder for transformers alone",
    )
    parser.add_argument(
        "--out",
        type=file_name,
        metavar="FOLDER",
        help="where to write it (default: export/ or merged/ in the run's folder, replaced each time)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        default="bf16",
        help="numeric type of a merged or whole model (default: %(default)s)",
    )
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the folder and print where it is."""
    need_packages()
    from fedspeed.monitor.activity_line import ActivityLine
    from fedspeed.session.export_run import export_run

    with ActivityLine():
        lines = export_run(arguments.run, merged=arguments.merged, out=arguments.out, dtype=arguments.dtype)
    print_result("\n".join(lines))
    return EXIT_OK
