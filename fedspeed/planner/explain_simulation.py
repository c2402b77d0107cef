"""A simulation in words and numbers for people, and as plain values for programs. Pure."""

import dataclasses
from collections.abc import Sequence

from fedspeed.planner.explain import table
from fedspeed.planner.hardware import GIB
from fedspeed.planner.simulate import RELAYS, ModelSimulation, Outcome, Strategy
from fedspeed.units import parameters_text


def as_values(found: Sequence[ModelSimulation]) -> list[dict]:
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
                        dataclasses.asdict(strategy) | ({} if ended is None else dataclasses.asdict(ended))
                        for strategy, ended in all_ways
                    ],
                }
                for job, task, all_ways in one.tasks
            ],
            "alone": dataclasses.asdict(one.alone),
            "scales": [dataclasses.asdict(s) for s in one.scales],
        }
        for one in found
    ]


def as_text(found: Sequence[ModelSimulation], epochs: int) -> str:
    return "\n\n".join(part for one in found for part in (_tasks(one, epochs), _scales(one)))


def _tasks(one: ModelSimulation, epochs: int) -> str:
    task = one.tasks[0][1]
    rows = [
        [f"{job.name} ({job.clients}, {own.dtype})", strategy.name, *_numbers(strategy, ended), strategy.note]
        for job, own, all_ways in one.tasks
        for strategy, ended in all_ways
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
        f"{task.shape.name}: {parameters_text(task.shape.total)} parameters, "
        f"{parameters_text(task.trainable)} train, rows of {task.tokens} tokens, "
        f"{task.local_steps} local steps a round, {epochs} "
        f"epoch{'s' if epochs > 1 else ''}\n{table(head, rows)}"
    )


def _numbers(strategy: Strategy, ended: Outcome | None) -> list[str]:
    if ended is None:
        return ["-"] * 8
    return [
        f"{strategy.device_bytes / GIB:.1f}",
        f"{strategy.ram_bytes / GIB:.1f}",
        f"{strategy.step:.2f}",
        f"{strategy.exchange:.3f}",
        f"{ended.round:.1f}",
        str(ended.rounds),
        f"{ended.whole / 3600:.2f}",
        f"{ended.rate:,.0f}",
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
