"""A round's update, step by step: begun, trained, sent, applied to the global state, reported. There is one
function for each step, and one type for what exists after it; `rounds` calls them in order. Before an update
is sent, `round_header` sums what all ranks must know beforehand.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedspeed import activity
from fedspeed.errors import FedSpeedError
from fedspeed.federation import overlap, server_optimizer
from fedspeed.federation.arrays import Arrays, are_finite
from fedspeed.federation.contribution import Contribution, is_usable
from fedspeed.federation.header import Header, Signals, SummedLedger
from fedspeed.federation.ledger import Ledger
from fedspeed.federation.link import PendingSum
from fedspeed.federation.methods.base import Aggregate
from fedspeed.federation.methods.turns import Trained, Turn
from fedspeed.federation.packed_tensors import tensors_digest
from fedspeed.federation.rank_components import RankComponents
from fedspeed.federation.recorder import Training
from fedspeed.federation.run_progress import Progress
from fedspeed.federation.schedule import sample_clients, turn_order
from fedspeed.federation.server_step import server_stepped
from fedspeed.federation.tensors import as_arrays, as_torch


@dataclass
class RoundUpdate:
    """What one rank collects over all exchanges of a round.

    Attributes:
        round: its number, from 1.
        clients: those sampled for the round, over the whole run.
        starts: under staleness, the predicted state that each of this rank's clients starts from; other
            clients start from the common state.
        frozen: names of arrays that no client trains in this round.
        ledger: this rank's counters and losses.
        memory: by client, the arrays that a client of this rank keeps for its next turn (`Turn.memory`): from
            the round before, replaced as clients finish their turns.
        counted: by client of this rank, whether all its updates of the round were usable.
        training: seconds and engine figures of the round's local steps.
        clipped: values beyond the range of the exchange, over all participants.
        before: the global state before the round's first exchange was applied.
        skipped: whether the sum of an exchange was settled before and has not been applied.
        summed: what headers have summed of the round's ledger so far: counters of its local steps. `ledger`
            then has what was added since. None where no header carries counters (mode plain).
        signals: summed over all ranks, whether the run is to stop after this round: by the header of its last
            update, or in mode plain with its ledger. None before that.
    """

    round: int
    clients: tuple[int, ...]
    starts: dict[int, Arrays]
    frozen: frozenset[str]
    ledger: Ledger
    memory: dict[int, Arrays]
    counted: dict[int, bool] = field(default_factory=dict)
    training: Training = field(default_factory=Training)
    clipped: int = 0
    before: Arrays | None = None
    skipped: bool = False
    summed: SummedLedger | None = None
    signals: Signals | None = None

    @property
    def is_last(self) -> bool:
        """Return whether it is known that the run stops after this round."""
        return self.signals is not None and self.signals.wants_stop


@dataclass(frozen=True, kw_only=True)
class TrainedUpdate:
    """Local steps that were taken for one exchange of a round, before anything is sent.

    Attributes:
        exchange: its number in the round, from 0; above 0 only for methods that exchange after every step.
        start: the common state that deltas are counted from.
        contribution: what this rank adds to the sum.
        memory: what the clients of this rank kept before these steps (`RoundUpdate.memory`).
    """

    update: RoundUpdate
    exchange: int
    start: Arrays
    contribution: Contribution
    memory: dict[int, Arrays]

    @property
    def place(self) -> str:
        """Return which exchange of the run it is for, such as `round 3` or `round 3, exchange 2`."""
        exchange = f", exchange {self.exchange + 1}" if self.exchange else ""
        return f"round {self.update.round}{exchange}"


@dataclass(frozen=True, kw_only=True)
class SentUpdate:
    """An exchange in progress.

    Attributes:
        header: what was summed before it. sent_at: its start, by time.perf_counter.
    """

    trained: TrainedUpdate
    header: Header
    pending: PendingSum
    sent_at: float

    @property
    def update(self) -> RoundUpdate:
        """Return the update of the round that the exchange belongs to."""
        return self.trained.update

    @property
    def round(self) -> int:
        """Return the number of the round that the exchange belongs to."""
        return self.trained.update.round


@dataclass(frozen=True, kw_only=True)
class AppliedUpdate:
    """An exchange whose sum has been applied to the global state.

    Attributes:
        start: the common state that it was trained from.
        aggregate: what the method made of the sum; None where the exchange was skipped.
        weight: sum of all clients' weights.
        scale: what the mean delta was multiplied by (`pacing.fednova_scale`).
    """

    update: RoundUpdate
    start: Arrays
    aggregate: Aggregate | None
    weight: float
    scale: float


def begin(
    components: RankComponents,
    round: int,
    *,
    memory: Mapping[int, Arrays],
    starts: dict[int, Arrays] | None = None,
) -> RoundUpdate:
    """Begin a round's update by sampling its clients.

    Args:
        memory: clients' memory after the round before; it is copied. starts: see `RoundUpdate`.
    """
    config = components.config
    return RoundUpdate(
        round=round,
        clients=sample_clients(
            config.run.seed, round, config.data.clients, config.federation.clients_per_round
        ),
        starts=starts or {},
        frozen=components.method.frozen(round),
        ledger=components.recorder.ledger(),
        memory=dict(memory),
    )


def train(
    components: RankComponents, progress: Progress, update: RoundUpdate, *, start: Arrays, exchange: int = 0
) -> TrainedUpdate:
    """Train this rank's clients of a round for one exchange. Collective over the ranks that share the base.

    Args:
        start: the common state that clients start from and deltas are counted from.
        exchange: its number in the round, from 0.
    """
    components.recorder.begin_training(update.round)
    clients = [client for client in components.role.clients if client in update.clients]
    steps = components.pace.steps(len(clients)) if components.trainer.exchanges == 1 else 1
    contribution = Contribution.empty(components.method.values(update.round))
    trained = TrainedUpdate(
        update=update, exchange=exchange, start=start, contribution=contribution, memory=dict(update.memory)
    )
    if not components.role.server:  # whose engine the method loads
        # Needed without turns too: pipeline ranks compute for others.
        components.engine.load_folded(as_torch(start))
    turns = [
        components.trainer.turn(
            client,
            update.round,
            update.starts.get(client, start),
            steps=steps,
            exchange=exchange,
            memory=update.memory.get(client),
        )
        for client in clients
    ]
    if components.role.server:
        channel = components.trainer.channel
        order = turn_order(update.clients, channel.speakers)
        components.method.serve(
            components.engine,
            channel,
            update.round,
            exchange,
            clients=order,
            state=start,
            trainer=components.trainer,
        )
    with components.pace.measure(len(clients), steps):
        for simultaneous in components.trainer.train(turns, progress.optimizers):
            for slot, (turn, result) in enumerate(simultaneous):
                _add_turn(components, progress, trained, turn, result, slot=slot)
            components.recorder.note_turns(update.ledger, simultaneous)
    components.recorder.end_training(update.training)
    return trained


def _add_turn(
    components: RankComponents,
    progress: Progress,
    trained: TrainedUpdate,
    turn: Turn,
    result: Trained,
    *,
    slot: int,
) -> None:
    """Add a turn's result to this rank's contribution if it is usable, and store what its client keeps.

    Args:
        slot: client slot of the engine that still contains the client.
    """
    update = trained.update
    client = turn.client
    usable = is_usable(result)
    update.counted[client] = update.counted.get(client, True) and usable
    if not usable:
        return
    factor = components.pace.delta_factor(result.sums.steps)
    trained.contribution.add(
        components.method,
        turn,
        result,
        start=trained.start,
        weight=components.weights[client],
        factor=factor,
        transform=components.transform,
    )
    if factor is not None:
        # All ranks of the client add the same number, and the ledger sums over ranks.
        square = trained.contribution.squares[client] / components.engine.groups.client_size
        update.ledger.add_client(client, delta_square=square)
    if components.config.federation.local_optimizer == "keep":
        progress.optimizers[client] = as_arrays(components.engine.optimizer_state(slot))
    if components.method.keeps_memory:
        update.memory[client] = result.memory


def send(components: RankComponents, trained: TrainedUpdate, header: Header) -> SentUpdate:
    """Start the sum over all clients' updates; it proceeds in the background.

    Args:
        header: of this update (`round_header.exchange_header`).
    """
    sent_at = time.perf_counter()
    is_compared = components.config.routing.sums_only and components.role.gateway
    pending = components.link.start(
        trained.contribution.vector,
        trained.contribution.weight,
        components.method.segments(trained.update.round),
        bounds=header.bounds,
        label=f"update of {trained.place}",
        state=tensors_digest(trained.start).sha256 if is_compared else b"",
    )
    return SentUpdate(trained=trained, header=header, pending=pending, sent_at=sent_at)


def predicted_starts(
    components: RankComponents, progress: Progress, trained: TrainedUpdate
) -> dict[int, Arrays]:
    """Return the state that each of this rank's clients continues from during the exchange (`overlap`)."""
    update = trained.update
    fraction = overlap.expected_fraction(progress.update_alignment, len(update.clients))
    return {
        client: overlap.predicted_start(
            components.config.federation,
            progress.state,
            progress.moments,
            delta,
            fraction=fraction,
            frozen=update.frozen,
        )
        for client, delta in trained.contribution.deltas.items()
    }


def apply(components: RankComponents, progress: Progress, sent: SentUpdate) -> AppliedUpdate:
    """Wait for the sum of an exchange, and apply it to the global state in `progress`. Where the exchange was
    skipped (`routing.exchange.Outcome`), the state stays as it is, and what clients keep becomes again what
    it was before, since the two belong together. Collective.

    Raises:
        FedSpeedError: no client's update is finite, or their sum is not; or a participant's weight is
            impossible.
        LostPeerError: a participant is missing.
    """
    trained = sent.trained
    update = sent.update
    round = update.round
    name = f"exchange of round {round}"
    wait_began = time.perf_counter()
    with activity.during(f"the {name}"):
        total = components.link.finish(sent.pending)
    waited_s = time.perf_counter() - wait_began
    # For the commit of the round before, which also deletes files that are out of date.
    components.progress_writer.wait()
    components.recorder.note_exchange(name, total, sent_at=sent.sent_at, waited_s=waited_s)
    if trained.exchange == 0:
        update.before = progress.state
    # Only now: whoever is lost before the sum has counted its local steps, but no update that arrived.
    if trained.exchange == components.trainer.exchanges - 1:
        components.recorder.note_updates(update.ledger, update.counted)
    if total.skipped:
        update.skipped = True
        update.memory = trained.memory
        return AppliedUpdate(update=update, start=trained.start, aggregate=None, weight=0.0, scale=1.0)
    contribution = trained.contribution
    sent.header.check_update(total, own_weight=contribution.weight, place=trained.place)
    if total.weight <= 0:
        raise FedSpeedError(f"round {round}: no client's update is finite; lower train.lr, or set train.clip")
    scale = components.pace.mean_scale(components.link, contribution, sent.header)
    update.clipped += total.clipped
    aggregate = components.method.aggregate(
        trained.start, total.vector, total.weight, round=round, exchange=trained.exchange, factor=scale
    )
    if not are_finite(aggregate.state):
        raise FedSpeedError(
            f"round {round}: the sum of the updates is beyond fp32; lower train.lr, or set train.clip"
        )
    _advance(components, progress, trained, aggregate)
    return AppliedUpdate(
        update=update, start=trained.start, aggregate=aggregate, weight=total.weight, scale=scale
    )


def _advance(
    components: RankComponents, progress: Progress, trained: TrainedUpdate, aggregate: Aggregate
) -> None:
    """Advance the global state by an aggregate: server optimizer first, then the method's server."""
    federation = components.config.federation
    before = progress.state
    target = aggregate.state
    if federation.staleness and trained.start is not before:  # another round was applied in the meantime
        target = overlap.carried_over(before, trained.start, target)
    moments, state = server_optimizer.update(
        federation, progress.moments, before, target, trained.update.frozen
    )
    progress.moments = moments
    progress.state = server_stepped(components, state, round=trained.update.round, exchange=trained.exchange)


def report(components: RankComponents, progress: Progress, applied: AppliedUpdate, ledger: Ledger) -> None:
    """Report a round to the monitor.

    Args:
        ledger: summed over all ranks.
    """
    update = applied.update
    assert update.before is not None, "the round's exchanges have been applied"
    components.recorder.report(
        update.round,
        update.clients,
        ledger,
        update_norm=components.method.update_norm(update.before, progress.state),
        factor_error=None if applied.aggregate is None else applied.aggregate.factor_error,
        factor_error_exact=components.method.factor_error_is_exact,
        clipped=update.clipped,
        skipped=int(update.skipped),
    )
