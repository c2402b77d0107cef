"""Simulated rounds of many clients: of the reference model on servers of its own, and of the measured
model's update.
"""

import argparse
import dataclasses
from typing import Any

from fedspeed.planner.many_clients import masked_cost, plain_cost

MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
HOSTFILE = "hostfiles/hetero10"
LINK = 10e9 / 8  # bytes/s of scale16's links


def reference(counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return rounds of the reference model, each client on a server like the slowest of hetero10, as
    `fedspeed simulate --scale` gives them.
    """
    from fedspeed.cli.planner_arguments import planned_task
    from fedspeed.cluster.hostfile import read
    from fedspeed.planner.simulate import TASKS, simulate_model

    arguments = argparse.Namespace(
        hostfile=HOSTFILE, config=None, overrides=[], tokens=None, rows=None, dtype=None, probe=[]
    )
    kinds = {(host.slots, host.facts): host for host in read(HOSTFILE).hosts}
    alone = [
        planned_task(arguments, MODEL, 1, hosts=[host], overrides=["cluster.ranks_per_client=auto"])
        for host in kinds.values()
    ]
    jobs = [(TASKS[2], *planned_task(arguments, MODEL, TASKS[2].clients))]
    return [dataclasses.asdict(one) for one in simulate_model(jobs, alone, 1, counts).scales]


def same_update(update_bytes: int, counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return what the formula says of exchanges of the measured model's update."""
    found = []
    for clients in counts:
        masked = masked_cost(update_bytes, LINK, clients)
        plain = plain_cost(update_bytes, LINK, clients)
        found += [
            {"clients": clients, "mode": "plain", "sent": plain.sent, "cpu": plain.cpu, "streams": 0.0},
            {
                "clients": clients,
                "mode": "mix+mask",
                "sent": masked.sent,
                "cpu": masked.cpu,
                "streams": masked.streams,
            },
        ]
    return found
