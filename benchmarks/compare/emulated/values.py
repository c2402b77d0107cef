"""An emulated run as plain values for JSON, beside what the simulator says. Pure."""

from dataclasses import asdict
from typing import Any

from benchmarks.compare.emulated.cluster import Measured
from benchmarks.compare.emulated.plans import Plan
from benchmarks.compare.simulated.values import case_values


def key_of(plan: Plan, time_scale: float, *, rounds: int, hostfile: str) -> str:
    """Return what identifies a run: another one with this key is the same measurement."""
    case = plan.case
    model = case.shape.name.rpartition("/")[2]
    rows = f"{case.rows} x {case.tokens} | {plan.local_steps} steps | x{time_scale:g}"
    where = f"{case.clients} clients of {hostfile}"
    return " | ".join([plan.way, model, where, rows, f"{rounds} rounds", *case.settings])


def run_values(plan: Plan, found: Measured, time_scale: float) -> dict[str, Any]:
    """Return the values of a run. Emulated seconds are as they passed, simulated ones times the scale."""
    simulated = plan.simulated
    return case_values(plan.case) | {
        "way": plan.way,
        "settings": list(plan.case.settings),
        "setting": simulated.setting,
        "fits": simulated.fits,
        "shortage": simulated.shortage,
        "local_steps": plan.local_steps,
        "time_scale": time_scale,
        "update_bytes": 4 * plan.values,
        "round_tokens": simulated.round_tokens,
        "emulated": asdict(found),
        "simulated": {
            "round": time_scale * simulated.round,
            "train": time_scale * simulated.train,
            "exchange": time_scale * simulated.exchange,
            "server": time_scale * simulated.server,
        },
    }
