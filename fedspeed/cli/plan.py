"""`fedspeed plan`: predict how a model fits on hosts, how fast it trains, and with which settings."""

import argparse

from fedspeed.cli.arguments import Commands
from fedspeed.cli.output import print_result
from fedspeed.cli.planner_arguments import add_planned_arguments, planned_task
from fedspeed.errors import EXIT_OK


def add(commands: Commands) -> None:
    """Add the command and its arguments to the parser."""
    parser = commands.add_parser(
        "plan",
        allow_abbrev=False,
        help="say how a model fits on the hosts, how fast it trains, and with which settings",
        description="Predict memory and time of every way to execute a run on the hosts of a hostfile, and "
        "print the "
        "fastest that fits. Nothing is started, nothing is read but dimensions.",
    )
    add_planned_arguments(parser)
    parser.add_argument(
        "--model", help="a known model, a folder with config.json, a config.json, or a hub name (model.base)"
    )
    parser.add_argument(
        "--clients", type=int, help="number of clients (data.clients; without a configuration: one a host)"
    )
    parser.add_argument(
        "--micro-batch",
        type=int,
        help="sequences of one forward and backward (default: the plan divides the rows)",
    )
    parser.add_argument(
        "--quantised",
        action="store_true",
        help="weigh a base in 8 and 4 bits too (engine.tier=int8, nf4), which gives other losses",
    )
    parser.add_argument("--json", action="store_true", help="the plan as one JSON object on stdout")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    import json

    from fedspeed.planner import search
    from fedspeed.planner.explain import as_values, explain
    from fedspeed.planner.task import notes_of

    task, places, nodes = planned_task(
        arguments, arguments.model, arguments.clients, arguments.micro_batch, arguments.quantised
    )
    found = search.plan(task, places, nodes, notes_of(places, nodes))
    print_result(json.dumps(as_values(found), indent=1) if arguments.json else explain(found))
    return EXIT_OK
