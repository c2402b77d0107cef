"""Clients' turns on one rank's engine: what the rounds, the audit and the comparison with a client alone
call.

A turn begins with the state that it starts from and an optimizer that is reset or restored, takes local steps
on the client's own rows, and ends with what the weights are then. As many clients take their turns at the
same time as the engine has client slots.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedspeed import activity
from fedspeed.config.run import RunConfig
from fedspeed.data.batches import client_step
from fedspeed.data.config import local_steps_of
from fedspeed.engine.client_engine import ClientEngine, Sums
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.methods.base import ALONE, Method, Trained, Turn
from fedspeed.federation.role import RankRole
from fedspeed.federation.schedule import lr_at
from fedspeed.federation.shared_channel import SharedChannel
from fedspeed.federation.tensors import as_arrays, as_torch

TURN = 0x7E4  # the stream of random numbers that turns draw from
Between = Callable[[int, Turn], None]


def turn_seed(seed: int, client: int, round: int, *, exchange: int = 0, share: int = 0) -> int:
    """Return a seed of what is drawn in a turn: a resumed round draws the same.

    Args:
        seed: of the run. exchange: within the round.
        share: a rank's share of the client's rows, for what the client's ranks draw apart; 0 for what they
            draw alike.
    """
    key = [seed, TURN, client, round, share, *([exchange] if exchange else [])]
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def first_step(turn: Turn, steps_per_round: int) -> int:
    """Return the number of a turn's first local step over the whole run, from 0."""
    return max(0, turn.round - 1) * steps_per_round + turn.exchange


class Trainer:
    """Takes turns on the engine of one rank.

    Args:
        monitor: is told of every local step; None: turns belong to no round that anybody watches.
        channel: between the method's server and the clients, on all ranks; None where there is no server.

    Attributes:
        steps_per_round: local steps that this rank's clients take in a round at most.
        exchanges: how often clients exchange updates in a round. channel: see above.
    """

    def __init__(
        self,
        config: RunConfig,
        role: RankRole,
        engine: ClientEngine,
        method: Method,
        *,
        monitor: Any = None,
        channel: SharedChannel | None = None,
    ):
        self._config = config
        self._role = role
        self._engine = engine
        self._method = method
        self._monitor = monitor
        self.channel = channel
        self.steps_per_round = local_steps_of(config.train, role.cluster)
        self.exchanges = self.steps_per_round if method.exchange_every == "step" else 1
        self._optimizers: Mapping[int, Arrays] = {}

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
        """Return what a client is to do in a round, from `state`."""
        seed = self.seed(client, round, exchange)
        return self._method.turn(
            client, round, state, steps=steps, seed=seed, memory=memory or {}, exchange=exchange
        )

    def alone(self, client: int, state: Arrays) -> Turn:
        """Return what a client is to do that trains without the others: all local steps of the run, from
        `state`.
        """
        steps = self._config.federation.rounds * self.steps_per_round
        return self._method.alone(client, state, steps=steps, seed=self.seed(client, ALONE))

    def seed(self, client: int, round: int, exchange: int = 0) -> int:
        """Return the seed of a client's turn, which all ranks of the client know alike."""
        return turn_seed(self._config.run.seed, client, round, exchange=exchange)

    def _dropout_seed(self, turn: Turn) -> int:
        """Return the seed of this rank's dropout in a turn: each rank of a client has rows of its own, and
        masks of its own.
        """
        share = self._engine.data_share[1]
        return turn_seed(self._config.run.seed, turn.client, turn.round, exchange=turn.exchange, share=share)

    def train(
        self, turns: Sequence[Turn], optimizers: Mapping[int, Arrays] | None = None
    ) -> Iterator[list[tuple[Turn, Trained]]]:
        """Take turns of equally many steps, and yield those that were taken at the same time.

        The engine still holds them then, in its client slots from the first one on. Collective over the ranks
        that share the base.

        Args:
            optimizers: states of local optimizers to go on with, by client; the others begin anew.
        """
        engine = self._engine
        slots = self._engine.client_slots
        self._optimizers = optimizers or {}
        steps = turns[0].steps if turns else 0
        accumulation = self._config.train.accumulation
        passes, backward = self._method.passes(engine, len(turns), steps, accumulation)
        with engine.matched_passes(passes, backward):
            for first in range(0, len(turns), slots):
                together = list(turns[first : first + slots])
                trained = self._method.train(engine, together, self)
                yield list(zip(together, trained, strict=True))

    # For methods: one turn's parts.

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
        self, engine: ClientEngine, turns: Sequence[Turn], *, between: Between | None = None
    ) -> list[Trained]:
        """Train turns by gradients: each takes its steps, on its own rows.

        Args:
            between: called with (client slot, turn) in every step once its gradients are there, before the
                weights move; may add to them (ClientEngine.add_to_gradients).
        """
        self.begin(engine, turns)
        sums = [Sums()] * len(turns)
        with self._watched(turns):
            for number in range(turns[0].steps):
                done = self._step(engine, turns, number, between)
                sums = [before + more for before, more in zip(sums, done)]
                self.stepped(turns, number, done)
        return [
            Trained(end=as_arrays(engine.state(slot)), sums=sums[slot], memory=turn.memory)
            for slot, turn in enumerate(turns)
        ]

    def rows(self, turn: Turn, number: int):
        """Return this rank's batches of a turn's local step `number`, from 0 (data.batches.StepBatches)."""
        train = self._config.train
        step = first_step(turn, self.steps_per_round) + number
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
        """Tell the method's server some arrays, and return what it answers, of whatever names, shapes and
        types (`Method.serve`). All ranks of a client ask together: what its gateway tells counts, and all
        hear the answer. What each rank has a part of is brought together before.

        Raises:
            LostPeerError: the server, or this client's gateway, is gone.
            FedSpeedError: what came is no set of arrays.
        """
        self.channel.send(self.channel.server, arrays)
        return self.channel.receive(self.channel.server)

    def lr(self, turn: Turn, number: int) -> float:
        """Return the learning rate of a turn's local step `number`, from 0."""
        whole = self._config.federation.rounds * self.steps_per_round
        return lr_at(self._config.train, first_step(turn, self.steps_per_round) + number, whole)

    def round_lr(self, round: int, exchange: int = 0) -> float:
        """Return the learning rate that clients begin a round's exchange with, those of this rank's cluster
        if clusters take different numbers of steps; in round 0 that of round 1.
        """
        whole = self._config.federation.rounds * self.steps_per_round
        begun = max(0, round - 1)
        return lr_at(self._config.train, begun * self.steps_per_round + exchange, whole)

    def public_batches(self, step: int):
        """Return this rank's batches of a step of the method's server over the public rows, as those of a
        client's local step (data.batches.StepBatches): ranks of the server get different rows.

        Args:
            step: of the server, from 0 over the whole run, as the method counts them.
        """
        train = self._config.train
        config = self._config
        assert self._role.public_rows is not None, "public_batches: only a server with public rows has some"
        ranks, client_rank = self._engine.data_share
        return client_step(
            self._role.public_rows,
            config.run.seed,
            config.data.clients,  # a stream of its own, behind those of all clients
            step,
            train.micro_batch,
            accumulation=train.accumulation,
            ranks=ranks,
            client_rank=client_rank,
        )

    def stepped(self, turns: Sequence[Turn], number: int, done: Sequence[Sums]) -> None:
        """Tell whoever watches that local step `number` of some turns is taken, with its sums by turn."""
        activity.advance()
        turn = turns[0]
        if self._monitor is not None:
            last = max(turn.steps, self.exchanges)
            self._monitor.step(turn.round, turn.exchange + number + 1, last, sum(done, Sums()).mean_loss)

    def _step(
        self, engine: ClientEngine, turns: Sequence[Turn], number: int, between: Between | None
    ) -> list[Sums]:
        """Take one local step of all turns; `Sums.steps` tells whether it moved the weights."""
        sums = engine.gradients([self.rows(turn, number) for turn in turns])
        if between is not None:
            for slot, turn in enumerate(turns):
                between(slot, turn)
        moved = engine.step(self.lr(turns[0], number))
        return [replace(own, steps=int(has_moved)) for own, has_moved in zip(sums, moved, strict=True)]

    def _watched(self, turns: Sequence[Turn]):
        """Surround the steps of turns that somebody watches."""
        if self._monitor is None:
            return contextlib.nullcontext()
        turn = turns[0]
        return activity.during(f"round {turn.round}", turn.steps, "local step", quiet=True)
