"""Outcomes as plain values for JSON: seconds, bytes, tokens. Pure."""

from typing import Any

from benchmarks.compare.simulated.cases import Case
from benchmarks.compare.simulated.outcome import Outcome
from benchmarks.compare.simulated.search import RATE_GOAL, TIME_GOAL, Found, Ratio

DIGITS = 5


def case_values(case: Case) -> dict[str, Any]:
    """Return what describes a case."""
    return {
        "model": case.shape.name,
        "devices": case.devices,
        "clients": case.clients,
        "epoch_rows": case.epoch,
        "tokens": case.tokens,
        "rows_a_rank": case.rows,
    }


def outcome_values(outcome: Outcome) -> dict[str, Any]:
    """Return what a method takes."""
    return {
        "method": outcome.method,
        "variant": outcome.variant,
        "setting": outcome.setting,
        "fits": outcome.fits,
        "shortage": outcome.shortage,
        "device_bytes": outcome.device_bytes,
        "needs": {
            who: {"device": need.device, "device_has": need.device_has, "ram": need.ram}
            for who, need in outcome.needs.items()
        },
        "step_s": {kind: _rounded(causes) for kind, causes in outcome.steps.items()},
        "local_steps": round(outcome.local_steps, DIGITS),
        "train_s": round(outcome.train, DIGITS),
        "exchange_s": round(outcome.exchange, DIGITS),
        "server_s": round(outcome.server, DIGITS),
        "first_s": round(outcome.first, DIGITS),
        "round_s": round(outcome.round, DIGITS),
        "training_tokens_s": round(outcome.training_rate, 1),
        "tokens_s": round(outcome.rate, 1),
        "epoch_h": round(outcome.hours, DIGITS),
    }


def found_values(found: Found) -> dict[str, Any]:
    """Return what the search has found of a baseline."""
    return {
        "baseline": found.baseline,
        "variant": found.variant,
        "runs_in": found.runs,
        "of_cases": found.cases,
        "does_not_fit": found.short,
        "refused": found.refused,
        "time_reached_in": found.reached_time,
        "throughput_reached_in": found.reached_rate,
        "time": _ratio_values(found.time, "time", TIME_GOAL),
        "throughput": _ratio_values(found.rate, "rate", RATE_GOAL),
        "missions_time": _ratio_values(found.missions_time, "time", TIME_GOAL),
        "missions_throughput": _ratio_values(found.missions_rate, "rate", RATE_GOAL),
    }


def _ratio_values(ratio: Ratio | None, which: str, goal: float) -> dict[str, Any] | None:
    if ratio is None:
        return None
    value = getattr(ratio, which)
    return case_values(ratio.case) | {
        "ratio": round(value, 3),
        "goal": goal,
        "reached": value >= goal,
        "mechanism": ratio.rate_mechanism if which == "rate" else ratio.mechanism,
        "baseline_setting": ratio.baseline.setting,
        "own_setting": ratio.own.setting,
        "baseline_round_s": round(ratio.baseline.round, DIGITS),
        "own_round_s": round(ratio.own.round, DIGITS),
    }


def _rounded(causes: dict[str, float]) -> dict[str, float]:
    return {cause: round(seconds, DIGITS) for cause, seconds in causes.items()}
