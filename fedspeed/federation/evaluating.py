"""The evaluation of a round: which of the run's models are scored for which clients, by the evaluators that
the session hands down."""

from collections.abc import Collection

from fedspeed.federation.arrays import Arrays
from fedspeed.federation.keeping import Progress
from fedspeed.federation.ledger import Ledger
from fedspeed.federation.methods.base import Method
from fedspeed.federation.parts import RankParts

COMMON = "adapter"  # the model that all clients have, unless they have one of their own


def own_model(client: int) -> str:
    """Return the name that a client's own model has in `Method.models`."""
    return f"client-{client}"


def whose(models: dict[str, Arrays], clients: Collection[int]) -> list[tuple[Arrays, list[int]]]:
    """Return the models to evaluate, each with the clients that it is evaluated for: a client's own one for
    that client, the common one for all others. Models of other names are only exported."""
    others = [client for client in clients if own_model(client) not in models]
    own = [(models[own_model(client)], [client]) for client in clients if own_model(client) in models]
    return [(models[COMMON], others), *own] if others else own


def evaluate(parts: RankParts, progress: Progress, ledger: Ledger, name: str) -> None:
    """Fill a ledger with what the run's models come to on what this rank's clients hold out.

    Collective over the ranks that share the base.

    Args:
        name: of the evaluation, for whoever watches.
    """
    engine, method = parts.engine, parts.method
    found = whose(method.models(progress.state, progress.memory), parts.role.clients)
    fewest = 1
    if type(method).models is not Method.models:  # ranks may have unequal numbers of models
        fewest = max(1, -engine.agree_least(-len(found)))
    found += [(progress.state, [])] * (fewest - len(found))
    for evaluator in parts.evaluators:
        for state, clients in found:
            for client, values in evaluator(engine, state, name, clients).items():
                ledger.add_client(client, **values)
