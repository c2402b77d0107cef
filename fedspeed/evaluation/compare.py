"""The comparison of the federated model with every client's model trained alone, on the held-out rows of all
clients.

For simulations only: every rank reads all clients' held-out rows, which a real federation does not allow.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedspeed import activity
from fedspeed.data.batches import Batch, eval_batches
from fedspeed.data.clients import ClientData
from fedspeed.engine.client_engine import ClientEngine, Sums
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.named_models import COMMON, assigned_models, has_own_models, models_of
from fedspeed.federation.rank_components import RankComponents
from fedspeed.federation.run_progress import Progress
from fedspeed.federation.tensors import as_torch
from fedspeed.federation.trainer import Trainer, simultaneous_turns

FIELDS = ("loss", "tokens", "exact", "rows")  # of engine.client_engine.Sums


@dataclass(frozen=True)
class Score:
    """One line of the comparison: a model's scores on the held-out rows of all clients. `accuracy` is the
    share of answers that greedy decoding reproduces exactly.
    """

    name: str
    held_out_loss: float
    accuracy: float


@dataclass(frozen=True)
class _Evaluation:
    """A model that this rank evaluates.

    Attributes:
        line: number of the comparison's line that its sums are added to.
        clients: on whose held-out rows it is evaluated.
    """

    line: int
    model: Arrays
    clients: Sequence[int]


def compare(
    components: RankComponents, progress: Progress, *, start: Arrays, client_data: Sequence[ClientData]
) -> list[Score]:
    """Return scores of the start state, of each client alone (with as many local steps as the federated run,
    and its optimizer kept throughout), and of the federated model. Where clients have models of their own,
    the last line combines each client's own model on its own held-out rows.

    Collective over all ranks of the run; each trains its own clients.

    Args:
        start: the state before the first round. progress: after the last round.
        client_data: rows of all clients of the run, by client number.
    """
    config = components.config
    count = components.config.data.clients
    all_clients = range(count)
    work = [
        _Evaluation(client + 1, model, all_clients)
        for client, model in train_alone(components, start).items()
    ]
    if 0 in components.role.clients:  # on all ranks of client 0, which match their passes
        work.append(_Evaluation(0, models_of(components.method, start, {})[COMMON], all_clients))
    work += [_Evaluation(count + 1, model, clients) for model, clients in _federated(components, progress)]
    rows = [eval_batches(data.val, config.train.micro_batch, data.pad_id, data.limit) for data in client_data]
    table = np.zeros((count + 2, len(FIELDS)))
    for line, sums in _evaluated(components.engine, work, rows):
        if components.role.gateway:
            table[line] += [getattr(sums, name) for name in FIELDS]
    total = components.link.sum(table.reshape(-1), 0.0).vector.reshape(table.shape)
    names = ["before", *(f"client {client} alone" for client in all_clients), "federated"]
    return [
        Score(name, float(loss / tokens), float(exact / answers))
        for name, (loss, tokens, exact, answers) in zip(names, total)
    ]


def train_alone(components: RankComponents, start: Arrays) -> dict[int, Arrays]:
    """Return by client the model that each client of this rank trains without the others."""
    trainer = Trainer(
        components.config, components.role, components.engine, components.method
    )  # without a monitor
    turns = [trainer.turn_alone(client, start) for client in components.role.clients]
    steps = sum(group[0].steps for group in simultaneous_turns(turns, components.engine.client_slots))
    with activity.during("the training of each client alone", steps, "local step"):
        results = [pair for pairs in trainer.train(turns) for pair in pairs]
    trained_models = {}
    for turn, trained in results:
        models = models_of(components.method, start | trained.end, {turn.client: trained.memory})
        [(trained_models[turn.client], _)] = assigned_models(models, [turn.client])
    return trained_models


def _federated(components: RankComponents, progress: Progress) -> Sequence[tuple[Arrays, Sequence[int]]]:
    """Return the final models that this rank evaluates, each with the clients on whose rows. The common model
    is evaluated by the ranks of client 0.
    """
    models = models_of(components.method, progress.state, progress.memory)
    if has_own_models(components.method):
        return assigned_models(models, components.role.clients)
    return [(models[COMMON], range(components.config.data.clients))] if 0 in components.role.clients else []


def _evaluated(
    engine: ClientEngine, work: Sequence[_Evaluation], rows: Sequence[list[Batch]]
) -> Iterator[tuple[int, Sums]]:
    """Evaluate models, and yield (line, sums) of each. Collective over the ranks that share the base.

    Args:
        rows: batches of held-out rows, by client.
    """
    batches = [[rows[client] for client in evaluation.clients] for evaluation in work]
    passes = sum(engine.eval_passes(of_model) for of_model in batches)
    count = sum(len(of_client) for of_model in batches for of_client in of_model)
    with (
        activity.during("the evaluation of each client alone", count, "batch"),
        engine.matched_passes(passes, backward=False),
    ):
        for evaluation, of_model in zip(work, batches):
            engine.load(as_torch(evaluation.model))
            yield evaluation.line, sum(engine.evaluate(of_model), Sums())
