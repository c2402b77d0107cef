"""`fedspeed audit`: measure what a coalition, also one that lies, learns of single clients."""

import argparse

from fedspeed.cli.arguments import QUICKSTART, Commands, file_name, numbers, positive
from fedspeed.cli.output import print_result
from fedspeed.cli.packages import need_packages
from fedspeed.errors import EXIT_OK, ConfigError


def add(commands: Commands) -> None:
    """Add the command and its arguments to the parser."""
    parser = commands.add_parser(
        "audit",
        allow_abbrev=False,
        help="measure what a coalition, also one that lies, learns of single clients in the anonymous modes",
        description="Trains the clients of a configuration in one process, plays the exchange over their "
        "updates, and lets attackers with the "
        "views of a coalition pair the updates of one round with those of the next. Then the coalition lies: "
        "it plays attacks on the sum of the last round, and the command prints how close it comes to one "
        "honest update, what becomes of the sum, and whom honest clients name. Clients lie that are named by "
        "--relays or --clients, or else by --owners; by default all but two.",
    )
    parser.add_argument(
        "--config",
        type=file_name,
        default=QUICKSTART,
        metavar="YAML",
        help="configuration of a run (default: the quickstart)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values over the configuration's")
    parser.add_argument(
        "--rounds", type=positive, default=40, help="rounds to train and to exchange (default: 40)"
    )
    parser.add_argument(
        "--values",
        type=positive,
        default=4096,
        help="of every update, how many values are exchanged (default: 4096)",
    )
    parser.add_argument("--modes", default="mix,mix+mask", help="which routing modes (default: mix,mix+mask)")
    for role, helps in (
        ("owners", "who reveal the cells of their chunks (default: all)"),
        ("relays", "who reveal their permutations (default: none)"),
        ("clients", "who reveal their own cells (default: none)"),
    ):
        parser.add_argument(
            f"--{role}", type=numbers, metavar="0,1,...", help=f"members of the coalition {helps}"
        )
    parser.add_argument("--json", action="store_true", help="the findings as one JSON object on stdout")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the audit and print its results."""
    import contextlib
    import dataclasses
    import json

    from fedspeed.config.load import load

    need_packages()
    loaded = load(arguments.config, arguments.overrides)
    from fedspeed.monitor.activity_line import ActivityLine
    from fedspeed.routing.audit.adversary import Coalition
    from fedspeed.routing.config import MODES
    from fedspeed.session.audit import audit, render

    modes = arguments.modes.split(",")
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise ConfigError(f"--modes: {', '.join(unknown)} is none of {', '.join(MODES)}")
    if arguments.owners is arguments.relays is arguments.clients is None:
        coalition = None
    else:
        everyone = frozenset(range(loaded.config.data.clients))
        coalition = Coalition(
            everyone if arguments.owners is None else arguments.owners,
            arguments.relays or frozenset(),
            arguments.clients or frozenset(),
        )
    with ActivityLine() if loaded.config.monitor.progress else contextlib.nullcontext():
        found = audit(loaded, arguments.rounds, arguments.values, modes, coalition)
    print_result(
        json.dumps(dataclasses.asdict(found), indent=1) if arguments.json else render(found, coalition)
    )
    return EXIT_OK
