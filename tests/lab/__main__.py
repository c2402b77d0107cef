"""Virtual clusters from the command line. Its commands are:

python -m tests.lab run HOSTFILE [--rate 1gbit] [--host NAME] [--env NAME=VALUE] -- COMMAND ...
    run a command on a virtual cluster
python -m tests.lab list
    list the labs that run or have crashed
python -m tests.lab down [ID ...] [--all]
    remove the folders of crashed labs, or end running labs
"""

import argparse
import signal
import sys

from fedspeed.errors import EXIT_USAGE, FedSpeedError
from tests.lab.cluster import VirtualCluster
from tests.lab.errors import LabError
from tests.lab.folder import find_labs, remove_lab


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    end = arguments.index("--") if "--" in arguments else len(arguments)  # behind it: the command
    args = _parser().parse_args(arguments[:end])
    args.command = arguments[end + 1 :]
    try:
        return args.action(args)
    except (LabError, FedSpeedError) as error:
        print(f"lab: {error}", file=sys.stderr)
        return EXIT_USAGE


def _run(args) -> int:
    """Run the command with the standard streams of this process and return its exit status; 128 + N after
    signal N.
    """
    if not args.command:
        raise LabError("no command; write it after `--`, for instance `-- bash`")
    process = None

    def forward(number, _):
        if process is None:
            sys.exit(128 + number)  # still starting; the `with` block cleans up
        process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, forward)
    with VirtualCluster(args.hostfile, rate=args.rate, env=dict(args.env)) as lab:
        process = lab.spawn(args.command, host=args.host, stdin=None)
        status = process.wait()
    return status if status >= 0 else 128 - status


def _list(args) -> int:
    for lab in find_labs():
        hosts = ", ".join(lab.state.hosts) if lab.state else ""
        print(f"{lab.id}  {'running' if lab.running else 'crashed'}  {lab.folder}  {hosts}".rstrip())
    return 0


def _down(args) -> int:
    labs = {lab.id: lab for lab in find_labs()}
    if unknown := [name for name in args.id if name not in labs]:
        raise LabError(f"no lab {', '.join(unknown)}; there are: {', '.join(labs) or 'none'}")
    for lab in labs.values():
        if args.all or lab.id in args.id or (not args.id and not lab.running):
            remove_lab(lab)
            print(f"removed {lab.id}")
    return 0


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.lab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    run = actions.add_parser(
        "run", help="run a command, written after `--`, on a virtual cluster that lives as long"
    )
    run.add_argument("hostfile")
    run.add_argument(
        "--rate", help="speed of every host's link, such as 200mbit or 1gbit; default: what the hostfile says"
    )
    run.add_argument("--host", help="where the command runs; default: the first host")
    run.add_argument(
        "--env",
        type=_variable,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="variable for the ranks on all hosts",
    )
    run.set_defaults(action=_run)
    show = actions.add_parser("list", help="show the labs of this machine")
    show.set_defaults(action=_list)
    down = actions.add_parser("down", help="remove what crashed labs have left")
    down.add_argument("id", nargs="*", help="end this lab, running or not")
    down.add_argument("--all", action="store_true", help="end all labs of this machine, running ones too")
    down.set_defaults(action=_down)
    return parser


if __name__ == "__main__":
    sys.exit(main())
