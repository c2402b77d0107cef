"""The results of all phases as one page of Markdown. Pure, but for reading the phases' files."""

import json
from collections.abc import Sequence
from pathlib import Path

# Column -> name in the result of a step.
COLUMNS = {
    "s a step": "s a step",
    "tokens/s": "tokens/s",
    "of arithmetic": "of arithmetic",
    "predicted s": "predicted s",
    "peak GiB": "peak GiB",
    "reserved GiB": "reserved GiB",
    "predicted GiB": "predicted GiB",
    "loads": "loads",
    "waited s": "waited s",
}


def read(folder: Path, names: Sequence[str]) -> list[dict]:
    """Return the results of the named phases, in their order."""
    return [json.loads(path.read_text()) for name in names if (path := folder / f"{name}.json").is_file()]


def summary(phases: Sequence[dict]) -> str:
    """Return the report: card, versions and date; a table of steps; the other results phase by phase."""
    about = next((phase["about"] for phase in phases if phase["about"]), {})
    dry = str(about.get("card", "")).startswith("none")
    lines = [
        "# A dry run: nothing of this was measured on a card" if dry else "# What was measured on the card",
        "",
        ", ".join(f"{name} {value}" for name, value in about.items()),
        "",
    ]
    lines += ["| phase | status | s |", "| --- | --- | ---: |"]
    lines += [f"| {phase['phase']} | {phase['status']} | {phase['seconds']} |" for phase in phases]
    lines += ["", f"| phase | step | {' | '.join(COLUMNS)} |", f"| --- | --- |{' ---: |' * len(COLUMNS)}"]
    for phase in phases:
        lines += [
            _row(phase["phase"], name, value) for name, value in phase["results"].items() if _is_step(value)
        ]
    for phase in phases:
        others = {name: value for name, value in phase["results"].items() if not _is_step(value)}
        if others:
            lines += ["", f"## {phase['phase']}", ""]
            lines += [f"- {name}: {_text(value)}" for name, value in others.items()]
    return "\n".join(lines) + "\n"


def _is_step(value) -> bool:
    return isinstance(value, dict) and "tokens/s" in value


def _row(phase: str, name: str, step: dict) -> str:
    cells = [str(step.get(key, "")) for key in COLUMNS.values()]
    return f"| {phase} | {name} | {' | '.join(cells)} |"


def _text(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items() if name != "where")
    return str(value)
