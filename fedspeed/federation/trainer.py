"""Clients' turns on one rank's engine, for the rounds, the audit and the comparison with a client alone.

A turn loads its start state and a fresh or restored optimizer, takes local steps on the client's own rows,
and ends with the trained weights. As many clients take their turns at the same time as the engine has client
slots.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedspeed import activity
from fedspeed.config.run import RunConfig
from fedspeed.data.batches import StepBatches, client_step, epoch_steps
from fedspeed.data.config import local_steps_of
from fedspeed.engine.client_engine import ClientEngine, Sums
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.methods.base import Method
from fedspeed.federation.methods.turns import ALONE, Between, Step, Trained, Turn, TurnSize
from fedspeed.federation.role import RankRole
from fedspeed.federation.round_monitor import RoundMonitor
from fedspeed.federation.schedule import lr_in_run
from fedspeed.federation.shared_channel import SharedChannel
from fedspeed.federation.tensors import as_arrays, as_torch
from fedspeed.models.folded import rank_of
from fedspeed.models.lora_ranks import leading

TURN_STREAM = 0x7E4  # the random stream of turns


def turn_seed(seed: int, client: int, round: int, *, exchange: int = 0, share: int = 0) -> int:
    """Return the random seed of a turn, a function of its arguments only, so that a resumed round draws the
    same.

    Args:
        seed: of the run. exchange: of the round, from 0.
        share: number of the rank's share of the client's rows, for draws that differ between the client's
            ranks; 0 for draws that are equal on all of them.
    """
    key = [seed, TURN_STREAM, client, round, share, *([exchange] if exchange else [])]
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def first_step(turn: Turn, steps_per_round: int) -> int:
    """Return the number of a turn's first local step, counted from 0 over the whole run.

    Args:
        steps_per_round: of the client.
    """
    return max(0, turn.round - 1) * steps_per_round + turn.exchange


def simultaneous_turns(turns: Sequence[Turn], slots: int) -> list[list[Turn]]:
    """Return turns in groups that are trained at the same time, at most `slots` each, the longest first.

    Turns of clients with different LoRA ranks may have different folded arrays, of which an engine has one
    set, so that a group has turns of one rank only. Clients that train alone for different numbers of steps
    are in different groups too, because their learning rates change at different steps.
    """
    alike: dict[tuple[int, int], list[Turn]] = {}
    for turn in sorted(turns, key=lambda turn: -turn.steps):
        length = turn.steps if turn.round == ALONE else 0
        alike.setdefault((rank_of(turn.start), length), []).append(turn)
    return [same[first : first + slots] for same in alike.values() for first in range(0, len(same), slots)]


class Trainer:
    """Trains clients' turns on the engine of one rank.

    Args:
        monitor: informed of every local step; None: these turns are not shown.
        channel: between the method's server and the clients, on all ranks; None where there is no server.

    Attributes:
        exchanges: number of exchanges in a round.
    """

    def __init__(
        self,
        config: RunConfig,
        role: RankRole,
        engine: ClientEngine,
        method: Method,
        *,
        monitor: RoundMonitor | None = None,
        channel: SharedChannel | None = None,
    ):
        self._config = config
        self._role = role
        self._engine = engine
        self._method = method
        self._monitor = monitor
        self._channel = channel
        self._cluster_steps = local_steps_of(config.train, role.cluster)
        self.exchanges = self._cluster_steps if method.exchange_every == "step" else 1
        self._optimizers: Mapping[int, Arrays] = {}

    @property
    def channel(self) -> SharedChannel:
        """Return the channel between the method's server and the clients; only for methods with a server."""
        assert self._channel is not None, "a method without a server has no channel"
        return self._channel

    @property
    def turn_size(self) -> TurnSize:
        """Return the size of every client's turn in a round, for a server that answers clients: all of them
        take equally many steps (`checks.serving_problem`).
        """
        train = self._config.train
        return TurnSize(
            steps=train.local_steps,
            micro_batches=train.accumulation,
            rows=train.micro_batch,
            tokens=self._config.data.max_tokens,
        )

    def steps_of(self, client: int) -> int:
        """Return the most local steps that a client of this rank takes in a round."""
        if self._config.federation.round_budget != "epoch":
            return self._cluster_steps
        train = self._config.train
        ranks, _ = self._engine.data_share
        rows = len(self._role.clients[client].sequences)
        return epoch_steps(rows, train.micro_batch * train.accumulation * ranks)

    def turn(
        self,
        client: int,
        round: int,
        state: Arrays,
        *,
        steps: int,
        exchange: int = 0,
        memory: Arrays | None = None,
    ) -> Turn:
        """Return a client's turn of a round that starts from `state`.

        Args:
            steps: that it takes at most, see `steps_of`.
        """
        seed = self.seed(client, round, exchange)
        taken = min(steps, self.steps_of(client))
        return self._method.turn(
            client, round, state, steps=taken, seed=seed, memory=memory or {}, exchange=exchange
        )

    def turn_alone(self, client: int, state: Arrays) -> Turn:
        """Return the turn of a client that trains without the others: all local steps of the run, from
        `state`.
        """
        steps = self._config.federation.rounds * self.steps_of(client)
        return self._method.turn_alone(client, state, steps=steps, seed=self.seed(client, ALONE))

    def seed(self, client: int, round: int, exchange: int = 0) -> int:
        """Return the seed of a client's turn, the same on all ranks of the client."""
        return turn_seed(self._config.run.seed, client, round, exchange=exchange)

    def _dropout_seed(self, turn: Turn) -> int:
        """Return the seed of this rank's dropout masks in a turn; each rank of a client draws its own."""
        share = self._engine.data_share[1]
        return turn_seed(self._config.run.seed, turn.client, turn.round, exchange=turn.exchange, share=share)

    def train(
        self, turns: Sequence[Turn], optimizers: Mapping[int, Arrays] | None = None
    ) -> Iterator[list[tuple[Turn, Trained]]]:
        """Train turns, and yield (turn, result) of those trained at the same time.

        When they are yielded, they are still in the engine's client slots, from slot 0 on. Collective over
        the ranks that share the base.

        Args:
            optimizers: by client, the state of the local optimizer to restore; other clients start afresh.
        """
        engine = self._engine
        self._optimizers = optimizers or {}
        groups = simultaneous_turns(turns, engine.client_slots)
        lengths = [(len(group), group[0].steps) for group in groups] or [(0, 0)]
        accumulation = self._config.train.accumulation
        passes = [self._method.passes(engine, count, steps, accumulation) for count, steps in lengths]
        with engine.matched_passes(sum(number for number, _ in passes), passes[0][1]):
            for simultaneous in groups:
                trained = self._method.train(engine, simultaneous, self)
                yield list(zip(simultaneous, trained, strict=True))

    # The steps of a turn, for methods that train in their own way.

    def begin(self, engine: ClientEngine, turns: Sequence[Turn]) -> None:
        """Load turns into the engine's first client slots, and seed this rank's dropout."""
        for slot, turn in enumerate(turns):
            optimizer = self._optimizers.get(turn.client)
            engine.load(
                as_torch(turn.start),
                as_torch(optimizer) if optimizer else None,
                frozen=turn.frozen,
                seed=self._dropout_seed(turn),
                slot=slot,
            )

    def local_steps(
        self,
        engine: ClientEngine,
        turns: Sequence[Turn],
        *,
        between: Between | None = None,
        step: Step | None = None,
    ) -> list[Trained]:
        """Train turns by gradient steps, each on its own rows, or by steps of the method's own.

        Args:
            turns: the longest first. Those that are finished wait for the others.
            between: called with (client slot, turn) between the gradients and the optimizer step; it may add
                to the gradients (ClientEngine.add_to_gradients).
            step: takes a step of the turns that go on in place of a gradient step, and returns their sums.
        """
        take = step or (lambda turns, number: self._step(engine, turns, number, between))
        self.begin(engine, turns)
        sums = [Sums()] * len(turns)
        with self.shown_progress(turns):
            for number in range(turns[0].steps):
                going_on = [turn for turn in turns if number < turn.steps]
                done = take(going_on, number)
                sums = [before + more for before, more in zip(sums, done)] + sums[len(done) :]
                self.stepped(going_on, number, done)
        return [
            Trained(
                end=leading(as_arrays(engine.state(slot)), rank_of(turn.start)),
                sums=sums[slot],
                memory=turn.memory,
            )
            for slot, turn in enumerate(turns)
        ]

    def rows(self, turn: Turn, number: int) -> StepBatches:
        """Return this rank's batches of a turn's local step `number`, from 0."""
        train = self._config.train
        step = first_step(turn, self.steps_of(turn.client)) + number
        data = self._role.clients[turn.client]
        ranks, client_rank = self._engine.data_share
        return client_step(
            data,
            self._config.run.seed,
            turn.client,
            step,
            train.micro_batch,
            accumulation=train.accumulation,
            ranks=ranks,
            client_rank=client_rank,
        )

    def ask(self, arrays: Arrays) -> Arrays:
        """Send arrays to the method's server, and return its answer: arrays of any names, shapes and types
        (`Method.serve`). All ranks of a client call this together. The gateway's arrays are sent, so arrays
        that are divided over ranks must be gathered before; all ranks receive the answer.

        Raises:
            LostPeerError: the server, or this client's gateway, is gone.
            FedSpeedError: the answer is not a set of arrays.
        """
        self.channel.send(self.channel.server, arrays)
        return self.channel.receive(self.channel.server)

    def tell(self, arrays: Arrays) -> None:
        """Send arrays to the method's server, which does not answer. All ranks of a client call this
        together, and the gateway's arrays are sent.

        Raises:
            LostPeerError: the server, or this client's gateway, is gone.
        """
        self.channel.send(self.channel.server, arrays)

    def lr(self, turn: Turn, number: int) -> float:
        """Return the learning rate of a turn's local step `number`, from 0."""
        steps = self.steps_of(turn.client)
        return lr_in_run(self._config, first_step(turn, steps) + number, steps)

    def round_lr(self, round: int, exchange: int = 0) -> float:
        """Return the learning rate of a round's first local step before an exchange, or that of local step
        `exchange` in a round of one exchange; in round 0, that of round 1. Where clusters take different
        numbers of steps, it is that of this rank's cluster.
        """
        begun = max(0, round - 1) * self._cluster_steps
        return lr_in_run(self._config, begun + exchange, self._cluster_steps)

    def public_batches(self, step: int) -> StepBatches:
        """Return this rank's batches of public rows for a step of the method's server. As with a client's
        local step, the server's ranks get different rows.

        Args:
            step: counted by the method, from 0 over the whole run.
        """
        train = self._config.train
        config = self._config
        assert self._role.public_rows is not None, "only a server whose method has public rows calls this"
        ranks, client_rank = self._engine.data_share
        return client_step(
            self._role.public_rows,
            config.run.seed,
            config.data.clients,  # the random stream that follows those of all clients
            step,
            train.micro_batch,
            accumulation=train.accumulation,
            ranks=ranks,
            client_rank=client_rank,
        )

    def stepped(self, turns: Sequence[Turn], number: int, done: Sequence[Sums]) -> None:
        """Report a finished local step to the progress display and the monitor.

        Args:
            turns: trained at the same time. number: of the step, from 0. done: its sums, by turn.
        """
        activity.advance()
        turn = turns[0]
        if self._monitor is not None:
            last = max(turn.steps, self.exchanges)
            self._monitor.step(turn.round, turn.exchange + number + 1, last, sum(done, Sums()).mean_loss)

    def _step(
        self, engine: ClientEngine, turns: Sequence[Turn], number: int, between: Between | None
    ) -> list[Sums]:
        """Take one local step of all turns; `Sums.steps` is 0 where the optimizer skipped it, else 1. A
        skipped step has no learning rate either.
        """
        sums = engine.gradients([self.rows(turn, number) for turn in turns])
        if between is not None:
            for slot, turn in enumerate(turns):
                between(slot, turn)
        lr = self.lr(turns[0], number)
        were_taken = engine.step(lr)
        return [
            replace(of_turn, steps=int(taken), lr_sum=lr * taken)
            for of_turn, taken in zip(sums, were_taken, strict=True)
        ]

    def shown_progress(self, turns: Sequence[Turn]) -> contextlib.AbstractContextManager[object]:
        """Return the context in which the turns' steps are shown as progress, if there is a monitor."""
        if self._monitor is None:
            return contextlib.nullcontext()
        turn = turns[0]
        return activity.during(f"round {turn.round}", turn.steps, "local step", quiet=True)
