"""Evaluate a model of ours with tasks of lm-evaluation-harness, which is an optional requirement."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from fedspeed.errors import FedSpeedError
from fedspeed.evaluation.harness_results import HarnessResult, HarnessSettings, HarnessTasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedspeed.engine.client_engine import ClientEngine

REQUIREMENT = "pip install -r requirements-eval.txt"


def check_installed() -> None:
    """Raise FedSpeedError if lm-evaluation-harness is not installed."""
    if find_spec("lm_eval") is None:
        raise FedSpeedError(
            "tasks of lm-evaluation-harness need the package lm-eval, which is not installed",
            remedy=f"{REQUIREMENT}, or choose from `fedspeed eval --list`",
        )


def load_tasks(names: Sequence[str], settings: HarnessSettings) -> list[HarnessTasks]:
    """Load tasks of the harness with their data.

    Args:
        names: of tasks, groups or tags of the harness, or paths of YAML files that define one.

    Raises:
        FedSpeedError: the harness is not installed, or knows no such task; the data of a task cannot be
            loaded; or a task executes generated code.
    """
    check_installed()
    from fedspeed.evaluation.lm_eval_runs import load_requested

    return load_requested(names, settings)


def evaluate_tasks(
    engine: "ClientEngine",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: HarnessTasks,
    settings: HarnessSettings,
) -> HarnessResult | None:
    """Compute tasks of the harness with the model in client slot 0 of an engine.

    Collective over the ranks of the client and over the ranks that share the base, which all call it with the
    same tasks.

    Returns:
        The result on the first rank of the client; None on its others.
    """
    from fedspeed.evaluation.lm_eval_adapter import EngineLM
    from fedspeed.evaluation.lm_eval_runs import run_tasks

    result = run_tasks(EngineLM(engine, tokenizer), tasks, settings)
    return None if engine.groups.client_rank else result
