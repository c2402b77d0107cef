"""The evaluation of a round: which of the run's models are scored for which clients, by the evaluators that
the session hands down.
"""

from fedspeed.federation.keeping import Progress
from fedspeed.federation.ledger import Ledger
from fedspeed.federation.named_models import has_own_models, models_of, whose
from fedspeed.federation.parts import RankParts


def evaluate(parts: RankParts, progress: Progress, ledger: Ledger, name: str) -> None:
    """Fill a ledger with what the run's models come to on what this rank's clients hold out.

    Collective over the ranks that share the base.

    Args:
        name: of the evaluation, for whoever watches.
    """
    engine = parts.engine
    method = parts.method
    found = whose(models_of(method, progress.state, progress.memory), parts.role.clients)
    fewest = 1
    if has_own_models(method):
        fewest = max(1, -engine.agree_least(-len(found)))
    found += [(progress.state, [])] * (fewest - len(found))
    for evaluator in parts.evaluators:
        for state, clients in found:
            for client, values in evaluator(engine, state, name, clients).items():
                ledger.add_client(client, **values)
