"""`fedspeed bench claims`: tables of docs/claims.md and README.md, from the kept results of other parts."""

import argparse


def add(commands: argparse._SubParsersAction) -> None:
    """Add the part to the parser."""
    parser = commands.add_parser(
        "claims",
        help="write the tables of docs/claims.md and README.md from the kept results",
        description="Write the tables of docs/claims.md and README.md from benchmarks/results/compare/.",
    )
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the tables; return the exit code."""
    from benchmarks.compare.claims.tables import tables, write

    write()
    print(f"{', '.join(map(str, tables()))}: the tables are those of the results")
    return 0
