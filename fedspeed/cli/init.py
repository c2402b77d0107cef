"""`fedspeed init`: write a commented configuration to start from."""

import argparse

from fedspeed.cli.arguments import Commands, file_name
from fedspeed.cli.output import print_result
from fedspeed.errors import EXIT_OK, ConfigError


def add(commands: Commands) -> None:
    """Add the command and its arguments to the parser."""
    parser = commands.add_parser(
        "init",
        help="write a commented configuration to start from",
        description="Write a YAML for a task, for rows of your own, for the hosts of a hostfile. A file "
        "that is there is never "
        "written over.",
    )
    parser.add_argument(
        "file",
        type=file_name,
        metavar="YAML",
        help="the file to write, such as run.yaml; its name is that of the run",
    )
    parser.add_argument(
        "--task",
        choices=("builtin", "gsm8k", "dolly", "codealpaca"),
        help="a task by name (default: builtin)",
    )
    parser.add_argument(
        "--data",
        type=file_name,
        metavar="ROWS",
        help="rows of your own: a file (.jsonl, .json, .csv, .tsv, .parquet), a pattern or a folder "
        "of files; their format and fields are found out",
    )
    parser.add_argument("--hostfile", type=file_name, help="hosts that the run is for")
    parser.add_argument(
        "--model", default="", help="model.base: a folder with config.json and *.safetensors, or a hub name"
    )
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the file and print what was detected."""
    from fedspeed.session.starter import check_target, starter

    if arguments.task and arguments.data:
        raise ConfigError(
            f"--task={arguments.task} and --data={arguments.data}: a run has the rows of one of them; leave "
            "the other out"
        )
    check_target(arguments.file)
    made = starter(
        arguments.file, arguments.task or "builtin", arguments.data, arguments.hostfile, arguments.model
    )
    try:
        with arguments.file.open("x", encoding="utf-8") as file:
            file.write(made.text)
    except OSError as error:
        raise ConfigError(
            f"{arguments.file}: cannot be written ({error.strerror}); choose another place"
        ) from error
    print_result(
        "\n".join([
            *made.remarks,
            f"{arguments.file}: written; check it with `python launch.py --config {arguments.file} "
            "--dry-run`",
        ])
    )
    return EXIT_OK
