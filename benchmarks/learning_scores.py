"""Scores of the models of benchmarks/learning.py on evaluation tasks, by `fedspeed eval`."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "scores"


@dataclass(frozen=True)
class Scoring:
    """An evaluation of some models.

    Attributes:
        name: suffix of the files of results. tasks: evaluation tasks, as `fedspeed eval --tasks` has them.
        limit: items of each, always the same ones; 0: all.
    """

    name: str
    tasks: str
    limit: int
    models: tuple[str, ...] = ("base", "federated", "centralised")


SCORINGS = {
    "gsm8k": (
        Scoring("200", "gsm8k_zero_shot,gsm8k", 200),
        Scoring("all", "gsm8k_zero_shot", 0, ("base", "federated")),
    ),
    "dolly": (Scoring("qa", "qa", 100),),
    "codealpaca": (
        Scoring("humaneval", "humaneval", 0, ("base", "federated")),
        Scoring("humanevalx", "humanevalx", 40, ("base", "federated")),
    ),
}


def _tasks_in(results: Path) -> set[str]:
    """Return the tasks with results: of an interrupted evaluation, not all of them."""
    return {result["task"] for result in json.loads(results.read_text())["results"]}


def score(task: str, base: str, folder: Path, machine: tuple[str, ...]) -> None:
    """Run the evaluations of a task that have no results yet; the files are FOLDER/scores/NAME-MODEL.json.

    Args:
        base: folder of the base. folder: of the task's runs. machine: overrides for this machine.

    Raises:
        SystemExit: an evaluation failed.
    """
    env = {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **os.environ}
    for scoring in SCORINGS[task]:
        for model in scoring.models:
            out = folder / FOLDER / f"{scoring.name}-{model}.json"
            if out.exists() and _tasks_in(out) >= set(scoring.tasks.split(",")):
                continue
            # The base is asked with the prompts that the others were trained with.
            target = [base, "data.template=alpaca", *machine] if model == "base" else [str(folder / model)]
            arguments = [*target, "--tasks", scoring.tasks, "--out", str(out)]
            arguments += ["--limit", str(scoring.limit)] if scoring.limit else []
            out.parent.mkdir(parents=True, exist_ok=True)
            arguments += ["--save-answers", str(out.with_suffix(".jsonl"))]
            print(f"{task}: {scoring.name} of {model}", flush=True)
            command = [sys.executable, "-m", "fedspeed", "eval", *arguments]
            if code := subprocess.run(command, cwd=ROOT, env=env, check=False).returncode:
                sys.exit(f"{task}: {scoring.name} of {model} ended with {code}; the same command goes on")
