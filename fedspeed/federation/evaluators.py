"""The interface of evaluators, which the rounds call. The room `evaluation` imports this one, not the
reverse: the session passes its evaluators to the rounds.
"""

from collections.abc import Collection
from typing import Protocol

from fedspeed.engine.client_engine import ClientEngine
from fedspeed.federation.arrays import Arrays


class TaskEvaluator(Protocol):
    """Scores the common model on the run's evaluation tasks; the ranks divide the items."""

    def is_due(self, round: int) -> bool:
        """Return whether the model is scored after a round; round 0: before round 1."""
        ...

    def __call__(self, engine: ClientEngine, state: Arrays) -> dict[str, float]:
        """Return sums over this rank's items by slot of the ledger.

        Collective over the ranks that share the base, which all call it equally often.

        Raises:
            FedSpeedError: a task cannot be scored.
        """
        ...


class Evaluator(Protocol):
    """Scores a model on the held-out rows of this rank's clients."""

    def __call__(
        self, engine: ClientEngine, state: Arrays, name: str, clients: Collection[int] | None = None
    ) -> dict[int, dict[str, float]]:
        """Return, by client, sums of the evaluation of `state` by slot of the ledger (val_loss, val_tokens,
        ...).

        Collective over the ranks that share the base, which all call it equally often.

        Args:
            name: of the evaluation, for the progress display.
            clients: those of this rank to score the state for; None: all of them. Where it is empty, the rank
                only takes part in the collectives.
        """
        ...
