"""A round's update: trained, sent, summed, and made a new state. One function each; `rounds` says in which
order.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedspeed import activity
from fedspeed.errors import FedSpeedError
from fedspeed.federation import overlap, server
from fedspeed.federation.arrays import Arrays, are_finite
from fedspeed.federation.contributing import Contribution, counts
from fedspeed.federation.keeping import Progress
from fedspeed.federation.ledger import Ledger
from fedspeed.federation.link import Started
from fedspeed.federation.methods.base import Aggregate, Trained, Turn
from fedspeed.federation.parts import RankParts
from fedspeed.federation.recording import Training
from fedspeed.federation.schedule import sample, turn_order
from fedspeed.federation.serving import server_stepped
from fedspeed.federation.tensors import as_arrays, as_torch


@dataclass
class Update:
    """One round's update, from its local steps to the state that it makes.

    Attributes:
        asked: clients of the round. start: the common state that it is trained from.
        starts: under staleness, what this rank's clients begin with instead.
        frozen: names that nobody trains.
        memory: by client, what this rank's clients alone go on with (Turn.memory): from the round before, and
            of this one for those that have taken their turns.
        exchange: which of the round's exchanges is next, from 0; methods that exchange every step have many.
        contribution: of this rank's clients to that exchange, once they have trained. counted: by client,
            whether all its updates do.
        ledger, training: what this rank measured.
        started, sent: the sum under way, and since when (time.perf_counter).
        before: the state before the round changed it. aggregate, weight, scale: of its last sum.
        clipped: values that were beyond what an exchange carries.
    """

    round: int
    asked: tuple[int, ...]
    start: Arrays
    starts: dict[int, Arrays]
    frozen: frozenset[str]
    ledger: Ledger
    memory: dict[int, Arrays]
    contribution: Contribution | None = None
    exchange: int = 0
    counted: dict[int, bool] = field(default_factory=dict)
    training: Training = field(default_factory=Training)
    started: Started | None = None
    sent: float = 0.0
    before: Arrays | None = None
    aggregate: Aggregate | None = None
    weight: float = 0.0
    scale: float = 1.0
    clipped: int = 0


def begin(
    parts: RankParts,
    round: int,
    *,
    start: Arrays,
    memory: Mapping[int, Arrays],
    starts: dict[int, Arrays] | None = None,
) -> Update:
    """Begin a round's update: sample its clients.

    Args:
        memory: of the round before, which stays as it is. start, starts: see `Update`.
    """
    config = parts.config
    return Update(
        round=round,
        asked=sample(config.run.seed, round, config.data.clients, config.federation.clients_per_round),
        start=start,
        starts=starts or {},
        frozen=parts.method.frozen(round),
        ledger=parts.recorder.ledger(),
        memory=dict(memory),
    )


def train(parts: RankParts, progress: Progress, update: Update) -> None:
    """Let the clients of a round that this rank carries take their turns, for its next exchange."""
    parts.recorder.begin_training(update.round)
    mine = [client for client in parts.role.clients if client in update.asked]
    steps = parts.pace.steps(len(mine)) if parts.trainer.exchanges == 1 else 1
    update.contribution = Contribution.empty(parts.method.values(update.round))
    parts.engine.load_folded(as_torch(update.start))  # a rank without turns may compute for others
    turns = [
        parts.trainer.turn(
            client,
            update.round,
            update.starts.get(client, update.start),
            steps=steps,
            exchange=update.exchange,
            memory=update.memory.get(client),
        )
        for client in mine
    ]
    if parts.role.server:
        channel = parts.trainer.channel
        order = turn_order(update.asked, channel.speakers)
        parts.method.serve(parts.engine, channel, update.round, update.exchange, asked=order)
    with parts.pace.measured(len(mine), steps):
        for together in parts.trainer.train(turns, progress.optimizers):
            for slot, ended in enumerate(together):
                _contribute(parts, progress, update, ended, slot)
            parts.recorder.note_turns(update.ledger, together)
    parts.recorder.end_training(update.training)


def _contribute(
    parts: RankParts, progress: Progress, update: Update, ended: tuple[Turn, Trained], slot: int
) -> None:
    """Add a turn to what this rank sends, if it counts, and keep what its client goes on with.

    Args:
        slot: of the engine, where the client still is.
    """
    turn, trained = ended
    client = turn.client
    config = parts.config
    is_counted = counts(trained)
    update.counted[client] = update.counted.get(client, True) and is_counted
    if not is_counted:
        return
    factor = parts.pace.factor(trained.sums.steps)
    update.contribution.add(
        parts.method,
        turn,
        trained,
        start=update.start,
        weight=parts.weights[client],
        factor=factor,
        transform=parts.transform,
    )
    if factor is not None:
        moved = update.contribution.squares[client]
        update.ledger.add_client(client, moved=moved / parts.engine.groups.client_size)
    if config.federation.local_optimizer == "keep":
        progress.optimizers[client] = as_arrays(parts.engine.optimizer_state(slot))
    if parts.method.keeps_memory:
        update.memory[client] = trained.memory


def send(parts: RankParts, update: Update) -> None:
    """Begin the sum of all clients' updates."""
    update.sent = time.perf_counter()
    own = update.contribution
    update.started = parts.link.start(own.vector, own.weight, parts.method.parts(update.round))


def predicted_starts(parts: RankParts, progress: Progress, update: Update) -> dict[int, Arrays]:
    """Return what each of this rank's clients goes on from while its update is under way (see `overlap`)."""
    part = overlap.expected_part(progress.update_alignment, len(update.asked))
    return {
        client: overlap.predicted_start(
            parts.config.federation, progress.state, progress.moments, delta, part=part, frozen=update.frozen
        )
        for client, delta in update.contribution.deltas.items()
    }


def absorb(parts: RankParts, progress: Progress, update: Update) -> None:
    """Wait for the sum of an update, and make the global state what it says.

    Raises:
        FedSpeedError: there is no update that is finite, or their sum is not.
        LostPeerError: a participant is missing.
    """
    name = f"exchange of round {update.round}"
    round = update.round
    begin = time.perf_counter()
    with activity.during(f"the {name}"):
        total = parts.link.finish(update.started)
    waited_s = time.perf_counter() - begin
    parts.keeper.wait()  # of the round before: it clears away what no round needs
    parts.recorder.note_exchange(name, total, sent=update.sent, waited_s=waited_s)
    if total.weight <= 0:
        raise FedSpeedError(f"round {round}: no client's update is finite; lower train.lr, or set train.clip")
    own = update.contribution
    update.scale = parts.pace.scale(parts.link, own.weight, own.weighted_steps)
    update.weight = total.weight
    update.clipped += total.clipped
    update.aggregate = parts.method.aggregate(
        update.start, total.vector, total.weight, round=round, exchange=update.exchange, factor=update.scale
    )
    if not are_finite(update.aggregate.state):
        raise FedSpeedError(
            f"round {round}: the sum of the updates is beyond fp32; lower train.lr, or set train.clip"
        )
    _advance(parts, progress, update)


def _advance(parts: RankParts, progress: Progress, update: Update) -> None:
    """Move the global state by an update's aggregate, as the server optimizer and the server say."""
    federation = parts.config.federation
    before = progress.state
    target = update.aggregate.state
    if federation.staleness and update.start is not before:  # the state has moved since
        target = overlap.carried_over(before, update.start, target)
    moments, state = server.update(federation, progress.moments, before, target, update.frozen)
    update.before = before if update.before is None else update.before
    progress.moments = moments
    progress.state = server_stepped(parts, state, round=update.round, exchange=update.exchange)
    update.exchange += 1


def record(parts: RankParts, progress: Progress, update: Update, ledger: Ledger) -> None:
    """Tell what a round came to.

    Args:
        ledger: with everyone's values.
    """
    parts.recorder.record(
        update.round,
        update.asked,
        ledger,
        update_norm=parts.method.update_norm(update.before, progress.state),
        factor_error=update.aggregate.factor_error,
        factor_error_exact=parts.method.exact_error,
        clipped=update.clipped,
    )
