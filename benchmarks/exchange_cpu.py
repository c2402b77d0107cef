"""Measure how much of an update an anonymous exchange moves per CPU-second, here and in another checkout.

    python benchmarks/exchange_cpu.py [--before CHECKOUT] [--pairs 2] [--cases 16x25:local,3x200:tls]

A case is clients x MB of each update, and the transport: "local" (all clients in one process, one works at a
time) or "tls" (a process each, over loopback). Each is measured by the `benchmarks/anonymous.py` of either
checkout, in mode `mix+mask`, by turns, since a shared machine is not equally fast for long: the ratio of a
pair counts. Prints a table in Markdown with the median of the pairs.

Another checkout of the repository comes from `git worktree add CHECKOUT COMMIT`.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CASES = "4x50:local,16x25:local,3x100:tls,4x50:tls,16x25:tls"


def rate(checkout: Path, clients: str, mb: str, *, transport: str, repeat: int) -> float:
    """Return the GB of update per CPU-second of one client, in `mix+mask`, the best of some exchanges."""
    command = [sys.executable, str(checkout / "benchmarks" / "anonymous.py"), "--modes", "mix+mask"]
    options = ["--clients", clients, "--mb", mb, "--transport", transport, "--repeat", str(repeat)]
    run = subprocess.run([*command, *options], capture_output=True, text=True, check=True, cwd=checkout)
    measured = json.loads(run.stdout.strip().splitlines()[-1])["modes"]["mix+mask"]
    return float(mb) / 1000 / measured["cpu"]


def main() -> None:
    """Measure all cases, and print a row for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="a checkout of an older commit to compare with")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="exchanges of a run, of which the best counts")
    parser.add_argument("--cases", default=CASES)
    args = parser.parse_args()
    checkouts = [ROOT] if args.before is None else [args.before.resolve(), ROOT]
    headings = [
        "clients x MB",
        "transport",
        *(["now"] if len(checkouts) == 1 else ["before", "now", "ratio"]),
    ]
    print(f"| {' | '.join(headings)} |\n|{' --- |' * len(headings)}")
    for case in args.cases.split(","):
        size, transport = case.split(":")
        clients, mb = size.split("x")
        pairs = [
            [rate(c, clients, mb, transport=transport, repeat=args.repeat) for c in checkouts]
            for _ in range(args.pairs)
        ]
        columns = [f"{statistics.median(column):.3f}" for column in zip(*pairs)]
        if len(checkouts) > 1:
            columns.append(f"{statistics.median(now / before for before, now in pairs):.2f}")
        print(f"| {clients} x {mb} | {transport} | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
