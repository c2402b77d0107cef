"""What a method of federated training is: who trains what, what a client sends, and what the sum of it means.

The rounds (`federation.rounds`) call a method; it never calls them. All that decides is a function of arrays,
so every rank of every client, which hold the same state and hear the same sum, come to the same new state.

The order of a round: `turn` for each client that is asked, `train` for as many turns as the engine has client
slots, `encode` for each of them, the sum over all clients, `aggregate`, the server optimizer, `server_step`.
`models` says what is then evaluated and exported. A method that has a server (`RankRole.server`) computes on
it in `serve`, while clients train, and in `server_step`.

docs/methods.md says which member carries what of the methods that FedSpeed is compared with.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from fedspeed.engine.capabilities import Capability
from fedspeed.engine.spec import EngineSpec
from fedspeed.errors import ConfigError
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.layout import Layout
from fedspeed.federation.methods.config import METHODS, Entry, is_folder
from fedspeed.federation.methods.factors import distance
from fedspeed.federation.registered import class_in
from fedspeed.federation.shared_channel import SharedChannel
from fedspeed.models.folded import trainable

if TYPE_CHECKING:  # torch stays away from whoever only asks what a method needs
    from fedspeed.engine.client_engine import ClientEngine, Sums

ALONE = 0  # the round of a turn that a client takes without the others


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One client's part of one round, before it is trained.

    Attributes:
        start: full fp32 arrays by name that the client begins with.
        frozen: names that keep their value in this turn: what the client does not train. What no client of
            the round trains, `Method.frozen` says.
        steps: optimizer steps to take.
        seed: of what a method draws for the client in this turn: the turn's own, and alike on all ranks of
            the client. Dropout, which ranks draw apart, is the trainer's to seed.
        memory: what the client alone goes on with from its last turn that counted, empty before there was
            one. Journalled on its own host, never sent.
        exchange: which of the round's exchanges the turn leads to, from 0; always 0 unless
            `Method.exchange_every` is "step".
    """

    client: int
    round: int
    start: Arrays
    frozen: frozenset[str]
    steps: int
    seed: int
    memory: Arrays
    exchange: int = 0

    def starting_at(self, start: Arrays) -> "Turn":
        """Return the same turn from another start."""
        return replace(self, start=start)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a turn has come to: where the client ended, its sums (losses, tokens, steps that were taken), and
    its memory from now on.
    """

    end: Arrays
    sums: "Sums"
    memory: Arrays


@dataclass(frozen=True)
class Aggregate:
    """What a sum means: the whole state before any server optimizer, with what nobody trained. `factor_error`
    is the relative error of averaging LoRA's factors instead of their products, None where no product is
    trained.
    """

    state: Arrays
    factor_error: float | None


class Method(ABC):
    """One method of federated training; one instance a run and rank. What excludes it from a configuration
    stands where it is registered (`Entry`).

    Attributes:
        needs, server_needs: what a client's and the server's engine must be capable of
            (engine.capabilities.Capability), held against them before anything is built.
        hides: what the run's transforms of updates want hidden beside them (monitor.metrics.metric.BESIDE).
            The method does not send its sketch if that is among it.
        keeps_memory: whether clients go on with something of their own (`Turn.memory`), which is then
            journalled.
        exact_error: whether `Aggregate.factor_error` is the error itself, or an estimate.
        exchange_every: "round", or "step": after every local step. Evaluation and journal keep to rounds.
            Each step is then a turn of its own, for which federation.local_optimizer=reset begins anew.
    """

    needs: ClassVar[frozenset[Capability]] = frozenset({"gradients"})
    server_needs: ClassVar[frozenset[Capability]] = frozenset()
    keeps_memory: ClassVar[bool] = False
    exact_error: ClassVar[bool] = False
    exchange_every: ClassVar[Literal["round", "step"]] = "round"

    def __init__(
        self, config: Any, layout: Layout, *, clients: int, seed: int, hides: frozenset[str] = frozenset()
    ):
        """Prepare the method for a run.

        Args:
            config: its options. layout: of the arrays that clients train. clients: of the whole run.
                seed: of the run. hides: see above.
        """
        self.config = config
        self.layout = layout
        self.clients = clients
        self.seed = seed
        self.hides = hides

    # Before anything is built.

    @classmethod
    def spec(cls, config: Any, spec: EngineSpec, *, shape: Any) -> EngineSpec:
        """Return what is to be built, given what the run's configuration asks for: other `blocks` of the
        model, say, or another optimizer.

        Args:
            config: the method's variant. spec: for the role that it names. shape: of the base
                (models.catalogue.ModelShape).
        """
        return spec

    @classmethod
    def min_holders(cls, config: Any, participants: Mapping[int, int], modules: int) -> int:
        """Return the fewest participants whose values meet in any element of any round's sum; 1 unless a
        method says more. Masked modes refuse fewer than `routing.min_participants`: an element that one
        participant holds alone is an update in the clear. What counts is who speaks, and not for how many: a
        slice whose clients all have one gateway is that gateway's alone.

        Args:
            config: the method's options. participants: by client of a round, the participant that carries it.
            modules: matrices that are adapted, 0 where that is not known.
        """
        return 1

    @classmethod
    def start_problem(cls, config: Any, state: Arrays) -> str:
        """Return what is wrong with starting from `state` and what to do about it, empty if nothing is."""
        return ""

    def first_state(self, state: Arrays) -> Arrays:
        """Return the state that a run begins with, given what the engine was built with: a method adds what
        all know and nobody trains (`KIND:NAME`) here, with the shapes that it keeps.
        """
        return state

    # A client's part.

    def frozen(self, round: int) -> frozenset[str]:
        """Return the names that no client trains in a round, which server optimizers leave alone, with their
        moments; rounds count from 1. `turn` freezes these, and where clients differ may freeze more for
        one.
        """
        return frozenset()

    def turn(
        self,
        client: int,
        round: int,
        state: Arrays,
        *,
        steps: int,
        seed: int,
        memory: Arrays,
        exchange: int = 0,
    ) -> Turn:
        """Return what a client is to do in a round that starts from `state`."""
        return Turn(
            client=client,
            round=round,
            start=state,
            frozen=self.frozen(round),
            steps=steps,
            seed=seed,
            memory=memory,
            exchange=exchange,
        )

    def alone(self, client: int, state: Arrays, *, steps: int, seed: int) -> Turn:
        """Return what a client is to do that trains without the others (federation.compare_alone): one turn
        as long as the run, of round ALONE. The client has then come to what `models` says that it is
        evaluated by, given its end as the common state, and its memory.

        Args:
            state: that the run started from. steps: of the whole run.
        """
        return self.turn(client, ALONE, state, steps=steps, seed=seed, memory={})

    def unsent(self, round: int) -> frozenset[str]:
        """Return the names that clients train in a round and keep to themselves: transforms of updates, which
        measure and change what leaves a client, do not see them.
        """
        return frozenset()

    def passes(self, engine: "ClientEngine", turns: int, steps: int, accumulation: int) -> tuple[int, bool]:
        """Return (passes over the base that `train` makes on this rank, whether they have a backward): ranks
        that share a base keep step by these.

        Args:
            turns: of this rank's clients in the round. steps: of each. accumulation: micro-batches of a step.
        """
        return engine.train_passes(turns, steps, accumulation), True

    def train(self, engine: "ClientEngine", turns: Sequence[Turn], trainer: Any) -> list[Trained]:
        """Train the turns in the engine's first client slots, all at the same time.

        Args:
            trainer: takes local steps (federation.trainer.Trainer).
        """
        return trainer.local_steps(engine, turns)

    @abstractmethod
    def values(self, round: int) -> int:
        """Return the length of the vector that a round sums."""

    def parts(self, round: int) -> tuple[int, ...]:
        """Return the lengths of what belongs together in that vector, in its order (routing.exchange gives
        each part a range of its own).
        """
        return (self.values(round),)

    @abstractmethod
    def encode(self, turn: Turn, end: Arrays, weight: float) -> np.ndarray:
        """Return [values] float32: what a client adds to the sum for having moved from `turn.start` to `end`,
        at its weight (answer tokens).
        """

    # The common part: the same on every rank.

    @abstractmethod
    def aggregate(
        self,
        state: Arrays,
        total: np.ndarray,
        weight: float,
        *,
        round: int,
        exchange: int = 0,
        factor: float = 1.0,
    ) -> Aggregate:
        """Return what the sum of all contributions makes of the state that the round was trained from.

        Args:
            total: [values] float32, the sum. weight: the sum of all clients' weights, above 0.
            factor: what the mean delta is multiplied by (FedNova's scale).
        """

    def update_norm(self, before: Arrays, after: Arrays) -> float:
        """Return the Euclidean norm of what has changed between two global states."""
        return distance(before, after, trainable(before))

    def serve(
        self,
        engine: "ClientEngine",
        channel: SharedChannel,
        round: int,
        exchange: int,
        *,
        asked: Sequence[int],
    ) -> None:
        """Answer the clients on the server, which are in `train` meanwhile, until they are done with the
        exchange. Clients reach the server by `Trainer.ask`. Where the server has several ranks, all of them
        call this together.

        Args:
            channel: to all clients. The first of the server's ranks speaks; all hear what a client has sent.
            asked: clients of the round, in the order of their turns: those of one rank that share client
                slots come one after the other, and ranks that share a base wait for each other, so whoever
                answers in another order waits for ever. `channel.speakers` tells whom to speak to.
        """

    def server_step(
        self,
        state: Arrays,
        engine: "ClientEngine",
        public_rows: Any,
        *,
        round: int,
        exchange: int,
        trainer: Any,
    ) -> Arrays:
        """Return the state after what the server alone does with it: arrays of the same names and shapes.
        What it returns is told to all. Where the server has several ranks, all of them call this together.

        Args:
            state: after the aggregate and the server optimizer; in round 0, that before any training.
                engine: the server's own, see `spec`.
            public_rows: what federation.public_rows holds, as tokens (data.clients.ClientData, `train` only);
                None where the method reads none (`Entry.public_rows`).
            round: 0 once before round 1, and before what is evaluated there: what it makes is journalled with
                round 0. exchange: of the round, from 0.
            trainer: the server's own (federation.trainer.Trainer): draws this rank's batches of the public
                rows in `public_batches`, and knows the learning rate of a round in `round_lr`.
        """
        return state

    def models(self, state: Arrays, memory: Mapping[int, Arrays]) -> dict[str, Arrays]:
        """Return what is evaluated and exported, by name: full arrays for the engine.

        `adapter` is always there, and evaluated for all clients but those that have a model of their own,
        `client-N`. Models of other names are exported only. A client's own model is exported on its own host.

        Args:
            memory: of this rank's clients, by client.
        """
        return {"adapter": state}


def method_class(name: str) -> type[Method]:
    """Import a method; its module defines one class of that kind.

    Raises:
        ConfigError: its line in `METHODS` says that it has a server, and the class gives that nothing to do;
            or the other way round.
    """
    path = METHODS[name].module
    method = class_in(f"{path}.method" if is_folder(name) else path, Method)
    if problem := server_problem(name, METHODS[name], method):
        raise ConfigError(problem)
    return method


def server_problem(name: str, entry: Entry, method: type[Method]) -> str:
    """Return what is wrong with what is said of a method's server, empty if nothing is.

    Args:
        entry: where the method `name` is registered. method: its class.
    """
    given = [part for part in ("serve", "server_step") if getattr(method, part) is not getattr(Method, part)]
    where = "fedspeed/federation/methods/config.py"
    head = f"federation.method={name}"
    if given and not entry.server:
        has = f"{method.__name__} has {' and '.join(given)}"
        return f"{head}: {has}; say server=True of it in METHODS of {where}"
    if "serve" in given and entry.sums_only:
        return (
            f"{head}: METHODS of {where} says that sums over all clients are all that {method.__name__} "
            "needs "
            "(sums_only=True), but what a client tells serve is its own; leave one of them out"
        )
    if (entry.server or entry.public_rows) and not given:
        return (
            f"{head}: METHODS of {where} says that it has a server, but {method.__name__} has neither serve "
            "nor server_step; write one of them, or leave out server=True and public_rows=True"
        )
    return ""


def make_method(
    config: Any,
    state: Mapping[str, np.ndarray],
    *,
    clients: int,
    seed: int,
    hides: frozenset[str] = frozenset(),
) -> Method:
    """Build the method that a run's configuration names.

    Args:
        config: `federation.method`. state: any global state of the run, for names and shapes.
        hides: see `Method`.
    """
    layout = Layout.of(trainable(state))
    return method_class(config.name)(config, layout, clients=clients, seed=seed, hides=hides)
