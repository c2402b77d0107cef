"""Causes over several clients or hosts, with timed compute: a sleep in place of arithmetic, since all share
this machine's cores. Exchanges, transfers and schedules are real.
"""

import argparse
from statistics import median
from typing import Any

CLIENTS = 3
MICROS = 2  # of each client in a step of the pipeline


def overlap(repeat: int, quick: bool) -> dict[str, Any]:
    """Return the seconds of a round with the exchange behind the next round's training (`on`), and before it
    (`off`): federation.staleness 1 and 0.
    """
    from benchmarks.overlap_timed_compute import rounds

    args = argparse.Namespace(
        clients=CLIENTS, mb=10 if quick else 40, rounds=3, mode="mix+mask", cell_kib=4096, profile=False
    )
    args.compute_s = 0.3 if quick else 1.0
    seconds: dict[str, list[float]] = {"on": [], "off": []}
    for number in range(repeat):
        for variant in ("on", "off")[:: -1 if number % 2 else 1]:
            args.staleness = int(variant == "on")
            seconds[variant].append(rounds(args)[2] / args.rounds)
    return {"seconds": seconds, "losses": {}}


def pipelines(repeat: int) -> dict[str, Any]:
    """Return the seconds of a step of four clients in one pipeline over four hosts (`on`), and of one client
    after the other in the same pipeline (`off`), by turns in one start.
    """
    from benchmarks.pipeline_timed_compute import passes

    turn = [[MICROS] * 4] + [[MICROS if c == one else 0 for c in range(4)] for one in range(4)]
    steps = [median(_slowest(seconds)) for seconds, _ in passes(4, "1gbit", "cluster", turn * repeat)]
    turns = [steps[begin : begin + len(turn)] for begin in range(0, len(steps), len(turn))]
    on = [together for together, *_ in turns]
    off = [sum(alone) for _, *alone in turns]
    return {"seconds": {"on": on, "off": off}, "losses": {}}


def _slowest(seconds: list[list[float]]) -> list[float]:
    """Return the seconds of each step on the slowest rank, from [ranks][steps]."""
    return [max(step) for step in zip(*seconds, strict=True)]
