"""A simulation as text for people, and as plain values for programs. Pure."""

import dataclasses
from collections.abc import Sequence

from fedspeed.planner.explain import table
from fedspeed.planner.hardware import GIB
from fedspeed.planner.many_clients import RELAYS
from fedspeed.planner.simulate import ModelSimulation, Outcome, Strategy
from fedspeed.units import parameters_text


def as_values(simulations: Sequence[ModelSimulation]) -> list[dict]:
    """Return simulations as dicts, lists, numbers and texts."""
    return [
        {
            "model": one.tasks[0][1].shape.name,
            "tasks": [
                {
                    "task": job.name,
                    "clients": job.clients,
                    "rows": job.rows,
                    "dtype": task.dtype,
                    "tokens": task.tokens,
                    "ways": [
                        dataclasses.asdict(strategy)
                        | ({} if outcome is None else dataclasses.asdict(outcome))
                        for strategy, outcome in outcomes
                    ],
                }
                for job, task, outcomes in one.tasks
            ],
            "alone": dataclasses.asdict(one.alone),
            "scales": [dataclasses.asdict(s) for s in one.scales],
        }
        for one in simulations
    ]


def as_text(simulations: Sequence[ModelSimulation], epochs: int) -> str:
    """Return simulations as tables: the tasks of each model, then its rounds with many clients."""
    return "\n\n".join(part for one in simulations for part in (_tasks(one, epochs), _scales(one)))


def _tasks(one: ModelSimulation, epochs: int) -> str:
    task = one.tasks[0][1]
    rows = [
        [
            f"{job.name} ({job.clients}, {planned.dtype})",
            strategy.name,
            *_numbers(strategy, outcome),
            strategy.note,
        ]
        for job, planned, outcomes in one.tasks
        for strategy, outcome in outcomes
    ]
    head = [
        "task (clients, type)",
        "way",
        "device GiB",
        "RAM GiB",
        "step s",
        "exchange s",
        "round s",
        "rounds",
        "whole h",
        "tokens/s",
        "",
    ]
    return (
        f"{task.shape.name}: {task.shape.size_text}, "
        f"{parameters_text(task.trainable)} train, rows of {task.tokens} tokens, "
        f"{task.local_steps} local steps a round, {epochs} "
        f"epoch{'s' if epochs > 1 else ''}\n{table(head, rows)}"
    )


def _numbers(strategy: Strategy, outcome: Outcome | None) -> list[str]:
    if outcome is None:
        return ["-"] * 8
    return [
        f"{strategy.device_bytes / GIB:.1f}",
        f"{strategy.ram_bytes / GIB:.1f}",
        f"{strategy.seconds:.2f}",
        f"{strategy.exchange:.3f}",
        f"{outcome.round:.1f}",
        str(outcome.rounds),
        f"{outcome.whole / 3600:.2f}",
        f"{outcome.rate:,.0f}",
    ]


def _scales(one: ModelSimulation) -> str:
    head = [
        "clients",
        "in the clear s",
        f"masked s, {RELAYS} relays",
        "its CPU s a client",
        "round s",
        "round s, staleness 1",
        "tokens/s then",
    ]
    rows = [
        [
            f"{s.clients:,}",
            f"{s.plain:.2f}",
            f"{s.masked:.2f}",
            f"{s.masked_cpu:.2f}",
            f"{s.round:.1f}",
            f"{s.hidden:.1f}",
            f"{s.rate:,.0f}",
        ]
        for s in one.scales
    ]
    return (
        f"Many clients, each on a server like the slowest here, with {one.alone.name} "
        f"({one.alone.note})\n{table(head, rows)}"
    )
