"""What federation is worth: every client trained on its own rows only, beside the federated model, on the
held-out rows of all clients.

For simulations: it reads every client's held-out rows on every rank, which in a real federation nobody may.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedspeed import activity
from fedspeed.data.batches import Batch, eval_batches
from fedspeed.data.clients import ClientData
from fedspeed.engine.client_engine import ClientEngine, Sums
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.keeping import Progress
from fedspeed.federation.named_models import COMMON, assigned_models, has_own_models, models_of
from fedspeed.federation.parts import RankParts
from fedspeed.federation.tensors import as_torch
from fedspeed.federation.trainer import Trainer

FIELDS = ("loss", "tokens", "exact", "rows")  # of a model's sums over held-out rows


@dataclass(frozen=True)
class Score:
    """One line of the comparison on the held-out rows of all clients; `accuracy` is the share of answers that
    greedy decoding gives exactly.
    """

    name: str
    held_out_loss: float
    accuracy: float


@dataclass(frozen=True)
class _Scored:
    """A model that this rank is to score.

    Attributes:
        line: of the comparison, that its sums are added to. clients: on whose held-out rows.
    """

    line: int
    model: Arrays
    clients: Sequence[int]


def compare(
    parts: RankParts, progress: Progress, *, start: Arrays, everyone: Sequence[ClientData]
) -> list[Score]:
    """Return scores of the start, of each client alone (as many local steps as the federated run, its
    optimizer kept), and of the federated model as the last round evaluated it: where clients have models of
    their own, each is scored by its own, on its own held-out rows.

    Collective over all ranks of the run; each trains its own clients.

    Args:
        start: the state before the first round. progress: after the last one.
        everyone: rows of all clients of the run, by client number.
    """
    config = parts.config
    count = parts.config.data.clients
    everybody = range(count)
    alone = train_alone(parts, start)
    work = [_Scored(client + 1, model, everybody) for client, model in alone.items()]
    if 0 in parts.role.clients:  # all ranks of one client: passes are matched between them
        work.append(_Scored(0, models_of(parts.method, start, {})[COMMON], everybody))
    work += [_Scored(count + 1, model, clients) for model, clients in _federated(parts, progress)]
    rows = [eval_batches(data.val, config.train.micro_batch, data.pad_id, data.limit) for data in everyone]
    table = np.zeros((count + 2, len(FIELDS)))
    for line, sums in _evaluated(parts.engine, work, rows):
        if parts.role.gateway:
            table[line] += [getattr(sums, name) for name in FIELDS]
    total = parts.link.sum(table.reshape(-1), 0.0).vector.reshape(table.shape)
    names = ["before", *(f"client {client} alone" for client in everybody), "federated"]
    return [
        Score(name, float(loss / tokens), float(exact / answers))
        for name, (loss, tokens, exact, answers) in zip(names, total)
    ]


def train_alone(parts: RankParts, start: Arrays) -> dict[int, Arrays]:
    """Return the model that each client of this rank comes to without the others, by client."""
    trainer = Trainer(parts.config, parts.role, parts.engine, parts.method)  # nobody watches these turns
    turns = [trainer.turn_alone(client, start) for client in parts.role.clients]
    together = -(-len(turns) // parts.engine.client_slots)
    steps = max((turn.steps for turn in turns), default=0)
    with activity.during("the training of each client alone", together * steps, "local step"):
        ended = [pair for pairs in trainer.train(turns) for pair in pairs]
    found = {}
    for turn, trained in ended:
        models = models_of(parts.method, start | trained.end, {turn.client: trained.memory})
        [(found[turn.client], _)] = assigned_models(models, [turn.client])
    return found


def _federated(parts: RankParts, progress: Progress) -> list[tuple[Arrays, Sequence[int]]]:
    """Return what a run has come to as far as this rank is to score it: models, each with the clients on
    whose rows. What is common to all clients is scored by the ranks of client 0.
    """
    models = models_of(parts.method, progress.state, progress.memory)
    if has_own_models(parts.method):
        return assigned_models(models, parts.role.clients)
    return [(models[COMMON], range(parts.config.data.clients))] if 0 in parts.role.clients else []


def _evaluated(
    engine: ClientEngine, work: Sequence[_Scored], rows: Sequence[list[Batch]]
) -> Iterator[tuple[int, Sums]]:
    """Evaluate models, and yield (line, sums) of each. Collective over the ranks that share the base.

    Args:
        rows: held-out rows by client.
    """
    batches = [[rows[client] for client in scored.clients] for scored in work]
    passes = sum(engine.eval_passes(own) for own in batches)
    count = sum(len(batch) for own in batches for batch in own)
    with (
        activity.during("the evaluation of each client alone", count, "batch"),
        engine.matched_passes(passes, backward=False),
    ):
        for scored, own in zip(work, batches):
            engine.load(as_torch(scored.model))
            yield scored.line, sum(engine.evaluate(own), Sums())
