"""The interface of a method of federated training: which client trains what, what a client sends, and how the
sum of all updates becomes a new state.

The rounds (`federation.rounds`) call a method; a method never calls the rounds. Its decisions are functions
of arrays, so all ranks, which have the same state and receive the same sum, compute the same new state.

The order of a round: `turn` for each sampled client, `train` for as many turns as the engine has client
slots, `encode` for each of them, the sum over all clients, `aggregate`, the server optimizer, `server_step`.
`models` returns what is then evaluated, and `exports` what is exported of it. A method that has a server
(`RankRole.server`) computes there in `serve`, while clients train, and in `server_step`.

docs/methods.md shows which member implements which part of published methods.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np

from fedspeed.engine.capabilities import Capability
from fedspeed.engine.spec import EngineSpec
from fedspeed.errors import ConfigError
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.layout import Layout
from fedspeed.federation.methods.config import METHODS, is_folder
from fedspeed.federation.methods.factors import distance
from fedspeed.federation.methods.server_entry import SERVER_PARTS, server_problem
from fedspeed.federation.methods.serving import Serving
from fedspeed.federation.methods.turns import ALONE, Trained, Turn, TurnTrainer
from fedspeed.federation.registry_import import class_in
from fedspeed.models.catalogue import ModelShape
from fedspeed.models.folded import trainable
from fedspeed.planner.plan import Task

if TYPE_CHECKING:  # torch is not imported by modules that only ask what a method needs
    from fedspeed.engine.client_engine import ClientEngine


VALUE_BYTES = 4  # of a summed value, float32


@dataclass(frozen=True)
class Aggregate:
    """What a method makes of the sum of all updates.

    Attributes:
        state: the whole new state before any server optimizer, including arrays that no client trains.
        factor_error: relative error of averaging LoRA's factors instead of their products; None where no
            product is trained, or the method does not estimate it.
    """

    state: Arrays
    factor_error: float | None


class Traffic(NamedTuple):
    """Bytes that a client's gateway sends and receives in a round."""

    sent: float
    received: float


class Method(Serving, ABC):
    """One method of federated training; every rank has one instance in a run. The configurations that it
    cannot be combined with follow from its registration (`Entry`).

    Attributes:
        needs, server_needs: capabilities of a client's and of the server's engine
            (engine.capabilities.Capability), checked before anything is built.
        hides: what the run's transforms of updates hide (monitor.metrics.metric.REVEALABLE). A method does
            not send a sketch that is among it.
        keeps_memory: whether clients keep arrays of their own (`Turn.memory`), which are then journalled.
        factor_error_is_exact: whether `Aggregate.factor_error` is exact, not an estimate.
        server_arrays: names of trainable arrays that only the server's engine has.
        clients_per_round: number of clients that are sampled for each round, 0: all.
        all_clients: number of clients of all participants. Unlike `clients`, it is the same on all of them
            between organisations, where each site counts as one (`checks.participants_of`).
        evaluated: what rounds evaluate, if that is not what is exported (`exports`), for reports and model
            cards: "the held-out loss is that of ...".
        unequal_turns: whether a `train` of its own takes turns of different numbers of steps at the same
            time, the longest first, as `Trainer.local_steps` does; without it, federation.round_budget=epoch
            is refused.
        exchange_every: "round", or "step" for an exchange after every local step. Evaluation and journal are
            once a round in both cases. With "step" each step is a turn of its own, before which
            federation.local_optimizer=reset resets the optimizer.
    """

    needs: ClassVar[frozenset[Capability]] = frozenset({"gradients"})
    keeps_memory: ClassVar[bool] = False
    factor_error_is_exact: ClassVar[bool] = False
    evaluated: ClassVar[str] = ""
    unequal_turns: ClassVar[bool] = False
    exchange_every: ClassVar[Literal["round", "step"]] = "round"

    def __init__(
        self,
        config: Any,
        layout: Layout,
        *,
        clients: int,
        seed: int,
        hides: frozenset[str] = frozenset(),
        server_arrays: frozenset[str] = frozenset(),
        clients_per_round: int = 0,
        sites: int = 0,
    ):
        """Prepare the method for a run.

        Args:
            config: the method's options. layout: of the arrays that clients and server train, the union of
                those of all roles.
            clients: number of clients in the run. seed: of the run.
            hides, server_arrays, clients_per_round: see the class.
            sites: between organisations, number of participants that have clients; 0 elsewhere.
        """
        self.config = config
        self.layout = layout
        self.clients = clients
        self.all_clients = sites or clients
        self.seed = seed
        self.hides = hides
        self.server_arrays = server_arrays
        self.clients_per_round = clients_per_round

    # Before anything is built.

    @classmethod
    def spec(cls, config: Any, spec: EngineSpec, *, shape: ModelShape) -> EngineSpec:
        """Return the engine to build, derived from the one that the configuration describes; it may have
        other `blocks` or another optimizer, for example.

        Args:
            config: the method's options. spec: for the role that it names. shape: of the base.
        """
        return spec

    @classmethod
    def arrays_of(cls, config: Any, arrays: Arrays, *, role: Literal["client", "server"]) -> Arrays:
        """Return the arrays that a role's engine begins with, by their names in the state.

        A state is the union of all roles' arrays. An array that all roles have must begin with the same
        values in all of them; arrays that only one role has are sent by it.

        Args:
            config: the method's options. arrays: of the engine that `spec` describes for the role, by their
                names in it.
        """
        return arrays

    @classmethod
    def min_holders(cls, config: Any, participants: Mapping[int, int], modules: int) -> int:
        """Return the smallest number of participants that contribute to any element of any round's sum; 1
        unless a method guarantees more.

        Masked modes refuse less than `routing.min_participants`, because an element to which one participant
        contributes alone reveals its update. Participants are counted, not clients: if all clients that
        contribute to an element share one gateway, that element is the gateway's alone.

        Args:
            config: the method's options.
            participants: by client of a round, the participant that speaks for it.
            modules: number of matrices that are adapted, 0 where that is not known.
        """
        return 1

    @classmethod
    def planned(cls, config: Any, task: Task, *, role: Literal["client", "server"]) -> Task | None:
        """Return the task of a role as the planner has to model it, for predictions of memory. None: there is
        no such role, or the planner has no model of it. Of a server only base and trained arrays are
        predicted.

        Args:
            config: the method's options. task: of local steps by gradients, over the whole base.
        """
        return task if role == "client" else None

    @classmethod
    def start_problem(cls, config: Any, state: Arrays) -> str:
        """Return why the method cannot start from `state`, and the remedy; empty if it can."""
        return ""

    def first_state(self, state: Arrays) -> Arrays:
        """Return the state that a run begins with.

        Args:
            state: the arrays that the engines of all roles begin with. A method may add arrays that all ranks
                know and no client trains (`KIND:NAME`); their shapes stay the same throughout the run.
        """
        return state

    # On clients.

    def frozen(self, round: int) -> frozenset[str]:
        """Return the names of arrays that no client trains in a round (counted from 1), those of the server
        among them. The server optimizer changes neither them nor their moments. `turn` freezes them, and may
        freeze more for one client.
        """
        return self.server_arrays

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
        """Return a client's turn in a round that starts from `state`; see `Turn` for the arguments."""
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

    def turn_alone(self, client: int, state: Arrays, *, steps: int, seed: int) -> Turn:
        """Return the turn of a client that trains without the others (federation.compare_alone): one turn as
        long as the run, of round ALONE. The client is then evaluated by the model that `models` returns for
        its end state and memory.

        Args:
            state: the start of the run. steps: of the whole run.
        """
        return self.turn(client, ALONE, state, steps=steps, seed=seed, memory={})

    def unsent(self, round: int) -> frozenset[str]:
        """Return the names of arrays that clients train in a round but do not send. Transforms of updates do
        not see them.
        """
        return frozenset()

    def passes(self, engine: "ClientEngine", turns: int, steps: int, accumulation: int) -> tuple[int, bool]:
        """Return (number of passes over the base that `train` makes on this rank, whether they include a
        backward). Ranks that share a base match their passes by these.

        Args:
            turns: of this rank's clients in the round. steps: of each turn. accumulation: micro-batches a
                step.
        """
        return engine.train_passes(turns, steps, accumulation), True

    def train(self, engine: "ClientEngine", turns: Sequence[Turn], trainer: TurnTrainer) -> list[Trained]:
        """Train turns at the same time, in the engine's first client slots.

        Args:
            trainer: takes local steps.
        """
        return trainer.local_steps(engine, turns)

    @abstractmethod
    def values(self, round: int) -> int:
        """Return the length of the vector that is summed in a round."""

    def traffic(self, task: Task, participants: int) -> Traffic:
        """Predict what a client's gateway sends and receives in a round of mode plain. By default, that
        of the plain sum, in which each participant adds up a part of the vector.

        Args:
            task: what clients compute. participants: of a sum.
        """
        moved = 2 * (participants - 1) / participants * self.values(1) * VALUE_BYTES
        return Traffic(moved, moved)

    def original_size(self) -> str:
        """Return what a client's update takes in the messages of the method's original implementation, and in
        which form, for the dry run; empty where that is not known, or no more than here.
        """
        return ""

    def segments(self, round: int) -> tuple[int, ...]:
        """Return the lengths of the consecutive segments of that vector. A masked exchange represents each
        segment with a range of its own (routing.exchange).
        """
        return (self.values(round),)

    @abstractmethod
    def encode(self, turn: Turn, end: Arrays, weight: float) -> np.ndarray:
        """Return a client's contribution to the sum: [values] float32.

        Args:
            end: the client's arrays after training, and after transforms of updates.
            weight: of the client; its contribution is already multiplied by it.
        """

    # On all ranks alike.

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
        """Return the new state that the sum of all contributions leads to.

        Args:
            state: that the round was trained from. total: [values] float32, the sum.
            weight: sum of all clients' weights, above 0.
            factor: multiplies the mean delta (FedNova's scale).
        """

    def update_norm(self, before: Arrays, after: Arrays) -> float:
        """Return the Euclidean norm of the change between two global states."""
        return distance(before, after, trainable(before))

    def models(self, state: Arrays, memory: Mapping[int, Arrays]) -> dict[str, Arrays]:
        """Return the models that are evaluated and exported, by name: all arrays of a client's engine each.
        Arrays of the server are exported where a model has them; clients are evaluated without them.

        `adapter` must be there, and is evaluated for all clients without a model of their own, `client-N`. A
        client's own model is exported on its own host. Models of other names are exported only.

        Args:
            memory: of this rank's clients, by client.
        """
        return {"adapter": state}

    def exports(self, state: Arrays, memory: Mapping[int, Arrays]) -> dict[str, Arrays]:
        """Return what is exported of the models, by the same names. It is another adapter than the evaluated
        one where clients train without the whole model (`evaluated`).
        """
        return self.models(state, memory)


def method_class(name: str) -> type[Method]:
    """Import a method's module, and return the one class of a method that it defines.

    Raises:
        ConfigError: its entry in `METHODS` and the class disagree about having a server.
    """
    path = METHODS[name].module
    method = class_in(f"{path}.method" if is_folder(name) else path, Method)
    assert issubclass(method, Method), "class_in returns a subclass"
    overridden = [part for part in SERVER_PARTS if getattr(method, part) is not getattr(Method, part)]
    problem = server_problem(name, METHODS[name], method.__name__, overridden)
    if problem:
        raise ConfigError(problem)
    return method


def make_method(
    config: Any,
    state: Mapping[str, np.ndarray],
    *,
    clients: int,
    seed: int,
    hides: frozenset[str] = frozenset(),
    server_arrays: frozenset[str] = frozenset(),
    clients_per_round: int = 0,
    sites: int = 0,
    lora_ranks: Sequence[int] = (),
) -> Method:
    """Build the method that a run's configuration names.

    Args:
        config: `federation.method`. state: any global state of the run, for its names and shapes.
        clients, seed, hides, server_arrays, clients_per_round, sites: see `Method`.
        lora_ranks: see `Entry.unequal_ranks`.
    """
    layout = Layout.of(trainable(state))
    ranks = {"lora_ranks": lora_ranks} if lora_ranks else {}
    return method_class(config.name)(
        config,
        layout,
        clients=clients,
        seed=seed,
        hides=hides,
        server_arrays=server_arrays,
        clients_per_round=clients_per_round,
        sites=sites,
        **ranks,
    )
