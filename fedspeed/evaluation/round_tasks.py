"""Evaluation tasks while a run goes on: each client's ranks score a share of the items."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedspeed.data.encode import Tokenizer
from fedspeed.data.eval_task import ALL, EvalTask, Tally
from fedspeed.data.prompt_template import PromptTemplate
from fedspeed.engine.client_engine import ClientEngine
from fedspeed.evaluation.config import EvaluationConfig
from fedspeed.evaluation.scoring import score_task
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.tensors import as_torch
from fedspeed.monitor.metrics.evaluation import score_slot, weight_slot


@dataclass(frozen=True, kw_only=True)
class RoundTasks:
    """The evaluation tasks of a run on one rank. It is a task evaluator (federation.evaluators).

    Attributes:
        tasks: each with the items that this rank's client scores, together with the client's other ranks.
        template: of the run's prompts.
        rounds: number of rounds of the run, after the last of which the tasks are scored too.
    """

    config: EvaluationConfig
    tasks: Sequence[tuple[EvalTask, Sequence[Any]]]
    tokenizer: Tokenizer
    template: PromptTemplate
    rounds: int

    def is_due(self, round: int) -> bool:
        """Return whether the tasks are scored after a round; round 0: before round 1."""
        return round % self.config.every == 0 or round == self.rounds

    def __call__(self, engine: ClientEngine, state: Arrays) -> dict[str, float]:
        """Return the sums of scores and weights by slot of the ledger. See
        `federation.evaluators.TaskEvaluator`.
        """
        engine.load(as_torch(state))
        sums = {}
        for task, items in self.tasks:
            scores = score_task(engine, task, items, tokenizer=self.tokenizer, template=self.template)
            tally = scores.main.get(ALL, Tally())
            sums[score_slot(task.name)] = tally.total
            sums[weight_slot(task.name)] = tally.weight
        return sums
