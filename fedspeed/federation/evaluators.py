"""What the rounds ask to be evaluated. Evaluation stands above the federation: the session hands
evaluators down."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Protocol

from fedspeed.engine.client_engine import ClientEngine
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.keeping import Progress
from fedspeed.federation.ledger import Ledger
from fedspeed.federation.named_models import has_own_models, models_of, whose

if TYPE_CHECKING:  # it has evaluators
    from fedspeed.federation.parts import RankParts


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


def evaluate(parts: "RankParts", progress: Progress, ledger: Ledger, name: str) -> None:
    """Fill a ledger with what the run's models come to on what this rank's clients hold out.

    Collective over the ranks that share the base.

    Args:
        name: of the evaluation, for whoever watches.
    """
    engine, method = parts.engine, parts.method
    found = whose(models_of(method, progress.state, progress.memory), parts.role.clients)
    fewest = 1
    if has_own_models(method):
        fewest = max(1, -engine.agree_least(-len(found)))
    found += [(progress.state, [])] * (fewest - len(found))
    for evaluator in parts.evaluators:
        for state, clients in found:
            for client, values in evaluator(engine, state, name, clients).items():
                ledger.add_client(client, **values)
