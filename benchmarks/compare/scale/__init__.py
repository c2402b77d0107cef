"""`scale`: seconds, CPU-seconds and bytes of a round, by the number of clients, and what bounds it."""

import argparse

from benchmarks.compare.results import add_folders


def add(commands: argparse._SubParsersAction) -> None:
    """Add the part and its arguments."""
    parser = commands.add_parser(
        "scale",
        help="rounds of few and of many clients, and what bounds them",
        description="Rounds of a tiny model in the clear and masked: real processes on this machine, one for "
        "each client; 16 clients on the hosts of hostfiles/scale16, which are network namespaces of this "
        "machine (needs root); and simulated servers. About nine minutes on two quiet cores; points that are "
        "in the JSON already are not measured again unless --fresh says so.",
    )
    parser.add_argument("--clients", type=_numbers, default=(4, 16, 64), help="real processes: 4,16,64")
    parser.add_argument(
        "--simulate", type=_numbers, default=(100, 1_000, 10_000), help="simulated clients: 100,1000,10000"
    )
    parser.add_argument("--no-hosts", action="store_true", help="leave out the hosts of scale16")
    parser.add_argument("--fresh", action="store_true", help="measure again what the JSON has already")
    add_folders(parser, "scale")
    parser.set_defaults(command=_run)


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(word) for word in text.split(","))
    if min(numbers) < 3:
        raise argparse.ArgumentTypeError("a masked sum needs three clients")
    return numbers


def _run(arguments: argparse.Namespace) -> int:
    from benchmarks.compare.scale.run import run

    return run(arguments)
