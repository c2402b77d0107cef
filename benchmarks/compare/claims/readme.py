"""The tables of README.md about costs, from the kept results of the other parts."""

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.compare.measured.records import Bench
from benchmarks.compare.measured.statistics import final_loss
from benchmarks.compare.outside.task import FEDERATION
from fedspeed.monitor.tables import table
from fedspeed.units import bytes_text

OURS = "fedspeed"  # begins the names of arms and systems that are FedSpeed


def quick_table(bench: Bench) -> str:
    """Return the table of methods side by side: medians over the seeds."""
    rows = []
    for name, title in bench.setting.arms.items():
        runs = bench.of(name).values()
        losses = [loss for run in runs if (loss := final_loss(run)) is not None]
        rows.append([
            _bold(title),
            bytes_text(statistics.median(run.device_bytes or 0 for run in runs)),
            bytes_text(statistics.median(run.sent for run in runs)),
            f"{statistics.median(run.first_aggregate_s for run in runs):.1f} s",
            f"{statistics.median(run.round_s for run in runs):.2f} s",
            f"{statistics.median(losses):.4f}",
        ])
    header = [
        "method",
        "device memory",
        "sent in a round, for each client",
        "first aggregate",
        "a round",
        "held-out loss",
    ]
    return table(header, rows, range(1, 6))


def outside_table(outside: Mapping[str, Any]) -> str:
    """Return the table of the federation's task under other systems: medians over the repetitions."""
    rows = []
    for row in outside["rows"]:
        if row["task"] == FEDERATION and row["verdict"] == "equal":
            rows.append([
                _bold(row["name"]),
                f"{row['first_aggregate_s']['median']:.1f} s",
                f"{row['round_s']['median']:.2f} s",
                f"{row['total_s']['median']:.1f} s",
                f"{row['rss_mb']['median'] / 1000:.2f} GB",
            ])
    header = ["system", "first aggregate", "a round", "whole command", "memory (RSS, all processes)"]
    return table(header, rows, range(1, 5))


def _bold(title: str) -> str:
    """Return a title with FedSpeed's name in bold."""
    return f"**{title[: len(OURS)]}**{title[len(OURS) :]}" if title.lower().startswith(OURS) else title
