"""`fedspeed simulate`: predict training on hosts that are not available."""

import argparse

from fedspeed.cli.arguments import Commands, positive
from fedspeed.cli.output import print_result
from fedspeed.cli.planner_arguments import add_planned_arguments, planned_task
from fedspeed.errors import EXIT_OK


def add(commands: Commands) -> None:
    """Add the command and its arguments to the parser."""
    parser = commands.add_parser(
        "simulate",
        allow_abbrev=False,
        help="say what training takes on hosts that are not here",
        description="Memory, step time, whole training and throughput of the planner's choice and of "
        "pipelines, whose instruction streams "
        "are executed against the planner's model of time: models x tasks on the hosts of a hostfile, and "
        "for many clients.",
    )
    add_planned_arguments(parser)
    parser.add_argument(
        "--model",
        action="append",
        metavar="MODEL",
        help="a known model, a folder with config.json, a config.json, or a hub name; several: once for "
        "each (default: the mission's five)",
    )
    parser.add_argument(
        "--epochs", type=positive, default=1, help="how often training sees a task's rows (default: 1)"
    )
    parser.add_argument(
        "--scale",
        type=positive,
        action="append",
        metavar="CLIENTS",
        help="many clients, each on a server of its own; several: once for each (default: 100, 1000, 10000)",
    )
    parser.add_argument(
        "--json", action="store_true", help="all of it as a JSON list on stdout, a model an item"
    )
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the predictions."""
    import json

    from fedspeed.cluster.hostfile import read
    from fedspeed.planner.explain_simulation import as_text, as_values
    from fedspeed.planner.simulate import MODELS, SCALES, TASKS, simulate_model

    def alone(model: str) -> list:
        """Return the plan of a single client on each kind of host."""
        kinds = {(host.slots, host.facts): host for host in read(arguments.hostfile).hosts}
        return [
            planned_task(arguments, model, 1, hosts=[host], overrides=["cluster.ranks_per_client=auto"])
            for host in kinds.values()
        ]

    found = []
    for model in arguments.model or MODELS:
        jobs = [(job, *planned_task(arguments, model, job.clients)) for job in TASKS]
        found.append(simulate_model(jobs, alone(model), arguments.epochs, arguments.scale or SCALES))
    print_result(
        json.dumps(as_values(found), indent=1) if arguments.json else as_text(found, arguments.epochs)
    )
    return EXIT_OK
