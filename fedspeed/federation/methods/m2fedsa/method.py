"""`m2fedsa`: U-shaped split learning with adapters, after M2FedSA (Zhang, Qi and Xu, ICML 2024), for causal
language models.

A client has both ends of the model: embedding, first blocks, last blocks, final norm and head, and with its
labels the loss. The server has the blocks between. In every micro-batch the client sends hidden states and
gets the output of the server's blocks; it sends the gradient of that output and gets the gradient of its
hidden states. Tokens, labels and losses stay on the client.

Both train LoRA factors in their blocks. Those of clients are averaged as by `lora_average`. The server's are
trained while it serves:

- `shared`: one adapter, with one client after the other and one optimizer in a round (SplitFed's second
  version, as published);
- `per_client`: an adapter and an optimizer for each client of the round, all beginning at the round's state;
  their weighted mean is the new state.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from fedspeed.data.clients import ClientData
from fedspeed.engine.spec import EngineSpec
from fedspeed.engine.split.messages import Limits, NotFiniteError, answer_of_zeros
from fedspeed.errors import ConfigError, FedSpeedError
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.layout import Layout
from fedspeed.federation.methods.base import VALUE_BYTES, Aggregate, Traffic
from fedspeed.federation.methods.lora_average.method import LoraAverage
from fedspeed.federation.methods.m2fedsa.due import END, check_due
from fedspeed.federation.methods.turns import Trained, Turn, TurnTrainer
from fedspeed.federation.shared_channel import SharedChannel
from fedspeed.models.catalogue import ModelShape
from fedspeed.planner.plan import Task

if TYPE_CHECKING:  # torch is not imported by modules that only ask what a method needs
    from fedspeed.engine.client_engine import ClientEngine
    from fedspeed.engine.split.body import BodyEngine
    from fedspeed.engine.split.ends import EndsEngine

SHARED = -1  # stands for the client of the one adapter that all clients train
BODY_STREAM = 0xB0D  # the random stream of the server's dropout


@dataclass
class _Served:
    """What serving a round has led to, until the server's step.

    Attributes:
        round: its number. bodies: by client, or by SHARED, the trained arrays. weights: by client, its weight
            in the round's sum; None before the sum. problem: what is not finite of a client's messages.
    """

    round: int
    bodies: dict[int, Arrays]
    weights: np.ndarray | None = None
    problem: str = ""


class M2FedSA(LoraAverage):
    """Split learning. The summed vector is that of `lora_average` for the clients' arrays, followed by the
    weight of each client, by which the server averages its own.
    """

    needs = frozenset({"split"})
    server_needs = frozenset({"split"})

    def __init__(self, config: Any, layout: Layout, **run: Any):
        super().__init__(config, layout, **run)
        self._served: _Served | None = None  # on the server, between `serve` and `server_step`

    @classmethod
    def spec(cls, config: Any, spec: EngineSpec, *, shape: ModelShape) -> EngineSpec:
        """Return the engine of a part of the model.

        Raises:
            ConfigError: no block is left for the server.
        """
        end = shape.layers - config.last
        if config.first >= end:
            raise ConfigError(
                f"federation.method.first={config.first} and federation.method.last={config.last} leave none "
                f"of the {shape.layers} blocks of {spec.model.base} to the server; choose smaller numbers"
            )
        if spec.role == "server":
            return replace(spec, part="body", blocks=tuple(range(config.first, end)))
        ends = (*range(config.first), *range(end, shape.layers))
        return replace(spec, part="ends", blocks=ends)

    @classmethod
    def planned(cls, config: Any, task: Task, *, role: Literal["client", "server"]) -> Task | None:
        """Return the task of a client, which has the blocks of both ends, or of the server, which has those
        between and neither embedding nor head.
        """
        ends = config.first + config.last
        if role == "client":
            return replace(task, shape=replace(task.shape, layers=ends))
        return replace(task, shape=replace(task.shape, layers=task.shape.layers - ends, vocab=0))

    @classmethod
    def server_slots(cls, config: Any, participants: int) -> int:
        return participants if config.body == "per_client" else 1

    # On clients.

    def train(self, engine: "ClientEngine", turns: Sequence[Turn], trainer: TurnTrainer) -> list[Trained]:
        with self._conversation(engine, trainer):
            return trainer.local_steps(engine, turns)

    @contextmanager
    def evaluating(self, engine: "ClientEngine", trainer: TurnTrainer) -> Iterator[None]:
        with self._conversation(engine, trainer):
            yield

    @contextmanager
    def _conversation(self, engine: "ClientEngine", trainer: TurnTrainer) -> Iterator[None]:
        """Compute inside with the server's blocks, and tell it when that is over."""
        with cast("EndsEngine", engine).asking(trainer.ask):
            yield
        trainer.tell({END: np.zeros(0, np.uint8)})

    def segments(self, round: int) -> tuple[int, ...]:
        return (*super().segments(round), self.clients)

    def encode(self, turn: Turn, end: Arrays, weight: float) -> np.ndarray:
        weights = np.zeros(self.clients, np.float32)
        weights[turn.client] = weight
        return np.concatenate([super().encode(turn, end, weight), weights])

    def traffic(self, task: Task, participants: int) -> Traffic:
        """Predict what a client's gateway sends and receives in a round: the plain sum; for each token of
        each local step two vectors to the server and two back; and the state after the server's step. Rows
        may be shorter than the longest, which counts here. Evaluations do not count.
        """
        summed = super().traffic(task, participants)
        tokens = task.local_steps * task.rows * task.tokens
        told = 2 * tokens * task.shape.hidden * task.type_bytes
        return Traffic(summed.sent + told, summed.received + told + VALUE_BYTES * self.layout.size)

    # On all ranks alike.

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
        if self._served is not None:
            assert self._served.round == round, "the server has served another round"
            self._served.weights = total[-self.clients :].astype(np.float64)
        return super().aggregate(
            state, total[: -self.clients], weight, round=round, exchange=exchange, factor=factor
        )

    # On the server.

    def serve(
        self,
        engine: "ClientEngine",
        channel: SharedChannel,
        round: int,
        exchange: int,
        *,
        clients: Sequence[int],
        state: Arrays,
        trainer: TurnTrainer,
    ) -> None:
        from fedspeed.federation.tensors import as_arrays, as_torch

        body = cast("BodyEngine", engine)
        tensors = as_torch(state)
        bodies: dict[int, Arrays] = {}
        served = _Served(round, bodies)
        self._served = served
        if self.config.body == "shared":
            body.load(tensors, seed=self._body_seed(round, SHARED))
            for client in clients:
                self._answer(body, channel, {client: 0}, trainer=trainer, served=served)
            bodies[SHARED] = as_arrays(body.state())
            return
        for group in simultaneous(clients, channel.speakers):
            slots = {client: slot for slot, client in enumerate(group)}
            for client, slot in slots.items():
                body.load(tensors, seed=self._body_seed(round, client), slot=slot)
            self._answer(body, channel, slots, trainer=trainer, served=served)
            for client, slot in slots.items():
                bodies[client] = as_arrays(body.state(slot))

    def _body_seed(self, round: int, client: int) -> int:
        key = [self.seed, BODY_STREAM, round, client + 1]
        return int(np.random.SeedSequence(key).generate_state(1)[0])

    def _answer(
        self,
        body: "BodyEngine",
        channel: SharedChannel,
        slots: Mapping[int, int],
        *,
        trainer: TurnTrainer,
        served: _Served,
    ) -> None:
        """Answer messages of some clients in turn, each of another participant, until their turns end. Once
        something is not finite, nothing is computed any more, and answers are zeros, so that all clients come
        to the end of the round, where they hear why.

        Args:
            slots: by client, its slot in the engine. trainer: knows the size of turns and the learning rates
                of the round. served: its problem is set.

        Raises:
            FedSpeedError: a message is not the one that is due; names the client.
        """
        size = trainer.turn_size
        numbers = dict.fromkeys(slots, 0)  # by client, of the message that is due
        steps = dict.fromkeys(slots, 0)
        while numbers:
            for client, number in list(numbers.items()):
                speaker = channel.speakers[client]
                slot = slots[client]
                message = channel.receive(speaker)
                with _naming([client]):
                    check_due(message, number, size)
                    if END in message:
                        del numbers[client]
                        continue
                    most = limits(channel, client, trainer)
                    answer = answer_of_zeros(message)
                    try:
                        if not served.problem:
                            answer = body.answer(slot, message, most=most, train=True)
                    except NotFiniteError as error:
                        served.problem = f"the participant of client {client}: {error}"
                numbers[client] += 1
                channel.send(speaker, answer)
                if body.ends_step(message) and not served.problem:
                    body.step(trainer.round_lr(served.round, steps[client]), only={slot})
                    steps[client] += 1

    def serve_evaluation(
        self, engine: "ClientEngine", channel: SharedChannel, state: Arrays, *, trainer: TurnTrainer
    ) -> None:
        from fedspeed.federation.tensors import as_torch

        body = cast("BodyEngine", engine)
        body.load(as_torch(state))
        clients: dict[int, list[int]] = {}  # by participant that still evaluates
        for client, speaker in enumerate(channel.speakers):
            clients.setdefault(speaker, []).append(client)
        while clients:
            for speaker, own in list(clients.items()):
                message = channel.receive(speaker)
                if list(message) == [END]:
                    del clients[speaker]
                    continue
                with _naming(own):
                    most = limits(channel, own[0], trainer)
                    answer = body.answer(0, message, most=most, train=False)
                channel.send(speaker, answer)

    def served_problem(self) -> str:
        return "" if self._served is None else self._served.problem

    def server_step(
        self,
        state: Arrays,
        engine: "ClientEngine",
        public_rows: ClientData | None,
        *,
        round: int,
        exchange: int,
        trainer: TurnTrainer,
    ) -> Arrays:
        if not round:
            return state
        served = self._served
        assert served is not None and served.round == round, "the server has served another round"
        if SHARED in served.bodies:
            trained = served.bodies[SHARED]
        else:
            assert served.weights is not None, "the round's sum comes before the server's step"
            weights = {c: served.weights[c] for c in served.bodies if served.weights[c] > 0}
            trained = weighted_mean(served.bodies, weights)
        self._served = None
        return state | trained


@contextmanager
def _naming(clients: Sequence[int]) -> Iterator[None]:
    """Add to a failure whose message it is about.

    Args:
        clients: of the participant that has sent it.
    """
    try:
        yield
    except FedSpeedError as error:
        raise FedSpeedError(f"the participant of client {', '.join(map(str, clients))}: {error}") from error


def limits(channel: SharedChannel, client: int, trainer: TurnTrainer) -> Limits:
    """Return the most that a message of a client, of all its ranks together, may have."""
    size = trainer.turn_size
    return Limits(rows=size.rows * channel.ranks[client], tokens=size.tokens)


def simultaneous(clients: Sequence[int], speakers: Sequence[int]) -> list[list[int]]:
    """Divide clients, in the order of their turns, into groups that train at the same time: no two of them
    have one speaker.

    Args:
        speakers: by client, the participant that speaks for it.
    """
    groups: list[list[int]] = []
    for client in clients:
        if not groups or speakers[client] in [speakers[other] for other in groups[-1]]:
            groups.append([])
        groups[-1].append(client)
    return groups


def weighted_mean(arrays: Mapping[int, Arrays], weights: Mapping[int, float]) -> Arrays:
    """Return the weighted mean of several clients' arrays in float32; no arrays where there are no weights.

    Args:
        arrays: by client. weights: of those that count, above 0.
    """
    if not weights:
        return {}
    whole = sum(weights.values())
    names = arrays[next(iter(weights))]
    return {
        name: np.asarray(
            sum(
                weight / whole * arrays[client][name].astype(np.float64) for client, weight in weights.items()
            ),
            np.float32,
        )
        for name in names
    }
