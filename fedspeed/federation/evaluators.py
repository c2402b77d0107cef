"""What the rounds ask to be evaluated. Evaluation stands above the federation: the session hands
evaluators down.
"""

from collections.abc import Collection
from typing import Protocol

from fedspeed.engine.client_engine import ClientEngine
from fedspeed.federation.arrays import Arrays


class Evaluator(Protocol):
    """Scores a model on what this rank's clients hold out."""

    def __call__(
        self, engine: ClientEngine, state: Arrays, name: str, clients: Collection[int] | None = None
    ) -> dict[int, dict[str, float]]:
        """Evaluate `state` and return sums by client: names of the ledger's slots (val_loss, val_tokens,
        ...).

        Collective over the ranks that share the base, which all call it equally often.

        Args:
            name: of the evaluation, for whoever watches.
            clients: of this rank, whom the state is for; None: all of them. May be empty: then the rank only
                keeps step with others.
        """
        ...
