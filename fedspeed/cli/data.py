"""`fedspeed data`: show what each client of a run would train on, and write the split as files."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from fedspeed.cli.arguments import PROJECT, Commands, file_name
from fedspeed.cli.output import print_result
from fedspeed.errors import EXIT_OK, ConfigError

if TYPE_CHECKING:
    from fedspeed.config.load import Loaded
    from fedspeed.data.overview import SplitOverview

TASKS = {"builtin": "quickstart", "gsm8k": "gsm8k", "dolly": "dolly", "codealpaca": "codealpaca"}
PLOT = "split.png"


def add(commands: Commands) -> None:
    """Add the command and its arguments to the parser."""
    parser = commands.add_parser(
        "data",
        allow_abbrev=False,
        help="show each client's rows, categories, lengths and an example, and write the split as files",
        description="Show what each client of a run would train on: rows that are kept, cut and lost, "
        "categories, token lengths, equal rows, and an example token by token. No model is loaded, only its "
        "tokenizer.",
    )
    parser.add_argument(
        "task", nargs="?", help=f"a published task, as its file in ds_configs splits it: {', '.join(TASKS)}"
    )
    parser.add_argument("--config", type=file_name, metavar="FILE", help="YAML of a run")
    parser.add_argument("--client", type=int, metavar="N", help="show this client only")
    parser.add_argument(
        "--out",
        type=file_name,
        metavar="FOLDER",
        help="write the split to it: train-client-N.jsonl, held-out.jsonl and a plot",
    )
    parser.add_argument("--plot", type=file_name, metavar="FILE", help="draw categories and lengths as PNG")
    parser.add_argument("--json", action="store_true", help="the overview as one JSON object on stdout")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that override the file's")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the overview of a split."""
    loaded = _loaded(arguments)
    config = loaded.config
    if arguments.client is not None and not 0 <= arguments.client < config.data.clients:
        raise ConfigError(
            f"--client={arguments.client}: data.clients={config.data.clients} clients are numbered from 0 to "
            f"{config.data.clients - 1}"
        )
    from fedspeed.data.clients import client_rows
    from fedspeed.data.overview import overview
    from fedspeed.data.split_files import write_split
    from fedspeed.models.tokenizer import load_tokenizer

    clients = client_rows(config.data, config.run.seed)
    view = overview(config.data, clients, load_tokenizer(config.model), arguments.client)
    if arguments.json:
        print_result(json.dumps(view.to_json(), ensure_ascii=False, indent=1))
    else:
        from fedspeed.monitor.split_text import split_text

        print_result(split_text(view))
    plots = [arguments.plot] if arguments.plot else []
    if arguments.out:
        write_split(arguments.out, clients)
        plots.append(arguments.out / PLOT)
    shown = f"{len(clients)} clients" if arguments.client is None else f"client {arguments.client}"
    for path in plots:
        _draw(view, path, f"{config.data.task}: {shown}")
    return EXIT_OK


def _loaded(arguments: argparse.Namespace) -> "Loaded":
    """Return the configuration that the arguments name.

    Raises:
        ConfigError: they name none or two, or it has faults.
    """
    from fedspeed.config.load import load

    task = arguments.task
    overrides = list(arguments.overrides)
    if task and "=" in task:
        overrides.insert(0, task)
        task = None
    if bool(task) == bool(arguments.config):
        raise ConfigError(f"name either a task ({', '.join(TASKS)}) or --config FILE")
    if task and task not in TASKS:
        raise ConfigError(
            f"{task[:40]!r} is no task; choose one of {', '.join(TASKS)}, or name a YAML with --config FILE"
        )
    return load(arguments.config or PROJECT / "ds_configs" / f"{TASKS[task]}.yaml", overrides)


def _draw(view: "SplitOverview", path: Path, title: str) -> None:
    """Draw the figure of a split into a file.

    Raises:
        ConfigError: the file cannot be written.
    """
    from fedspeed.files import write_atomically
    from fedspeed.monitor.plots import png
    from fedspeed.monitor.split_plot import split_figure

    try:
        write_atomically(path, png(split_figure(view, title)))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
