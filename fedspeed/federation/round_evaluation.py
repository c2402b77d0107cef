"""The evaluation of a round: which of the run's models are scored for which clients, by the evaluators that
the session passes to the rounds.
"""

from fedspeed.federation.arrays import Arrays
from fedspeed.federation.ledger import Ledger
from fedspeed.federation.named_models import COMMON, assigned_models, has_own_models, models_of
from fedspeed.federation.rank_components import RankComponents
from fedspeed.federation.run_progress import Progress


def evaluate(components: RankComponents, progress: Progress, ledger: Ledger, name: str) -> None:
    """Score the run's models on the held-out rows of this rank's clients, and add the sums to a ledger; the
    method's server, which has no rows, answers clients if the method has them ask. Collective over the ranks
    that share the base.

    Args:
        name: of the evaluation, for the progress display.
    """
    engine = components.engine
    method = components.method
    if components.role.server:
        trainer = components.trainer
        method.serve_evaluation(engine, trainer.channel, progress.state, trainer=trainer)
        return
    assigned: list[tuple[Arrays, list[int]]] = assigned_models(
        models_of(method, progress.state, progress.memory), components.role.clients
    )
    # Ranks that share the base evaluate equally many models; those with fewer evaluate one for no client.
    count = 1
    if has_own_models(method):
        count = max(1, -engine.agree_least(-len(assigned)))
    assigned += [(progress.state, [])] * (count - len(assigned))
    with method.evaluating(engine, components.trainer):
        for evaluator in components.evaluators:
            for state, clients in assigned:
                for client, values in evaluator(engine, state, name, clients).items():
                    ledger.add_client(client, **values)


def score_tasks(components: RankComponents, progress: Progress, ledger: Ledger, round: int) -> None:
    """Score the common model on the run's evaluation tasks in rounds in which that is due, and add this
    rank's sums to a ledger. Collective over the ranks that share the base.
    """
    evaluator = components.task_evaluator
    if evaluator is None or not evaluator.is_due(round):
        return
    models = models_of(components.method, progress.state, progress.memory)
    ledger.set_rank(components.role.worker_index, **evaluator(components.engine, models[COMMON]))
