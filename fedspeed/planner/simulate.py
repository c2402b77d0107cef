"""Simulated training on machines that are not at hand. Pure.

The planner's choice and both kinds of pipeline are compared on the reference models and tasks, and rounds are
extrapolated to many clients.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedspeed.cluster.topology import Topology
from fedspeed.errors import PlanError
from fedspeed.planner.hardware import Node
from fedspeed.planner.many_clients import masked_cost, plain_cost
from fedspeed.planner.pipeline.forecast import PipelineForecast, client_pipeline, cluster_pipeline
from fedspeed.planner.plan import RankProfile, Task
from fedspeed.planner.profiles import profile_of
from fedspeed.planner.search import plan
from fedspeed.planner.timing import exchange_s

MODELS = (
    *(f"deepseek-ai/DeepSeek-R1-Distill-{name}" for name in ("Qwen-1.5B", "Qwen-7B", "Llama-8B", "Qwen-14B")),
    "gpt3-6.7b",
)
SCALES = (100, 1_000, 10_000)
MICRO_BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Job:
    """A reference task: its number of clients and the training rows of all of them together."""

    name: str
    clients: int
    rows: int


TASKS = (
    Job("code generation", 9, 7_954),
    Job("question answering", 8, 15_015),
    Job("mathematical reasoning", 3, 7_473),
)


@dataclass(frozen=True)
class Strategy:
    """A way to execute a task on given machines. If it is impossible, `step` is None and `note` says why.

    Attributes:
        device_bytes: peak bytes of the fullest device.
        ram_bytes: peak bytes of the fullest node.
        step: seconds of one local step of every client, in the slowest cluster.
        rows: rows of all clients in that step.
        exchange: seconds of a round's exchange.
    """

    name: str
    note: str
    device_bytes: int = 0
    ram_bytes: int = 0
    step: float | None = None
    rows: int = 0
    exchange: float = 0.0

    @property
    def seconds(self) -> float:
        """Return the seconds of a step of a possible strategy."""
        assert self.step is not None, f"{self.name} is impossible: {self.note}"
        return self.step


@dataclass(frozen=True)
class Outcome:
    """A whole training: rounds, seconds of one round and of all, and the tokens/s of all clients together."""

    rounds: int
    round: float
    whole: float
    rate: float


def outcome(strategy: Strategy, task: Task, rows: int) -> Outcome:
    """Predict a training that sees `rows` rows in all.

    With federation.staleness=1 the exchange is hidden behind the next round's local steps.
    """
    train = task.local_steps * strategy.seconds
    one = max(train, strategy.exchange) if task.staleness else train + strategy.exchange
    rounds = math.ceil(rows / (strategy.rows * task.local_steps))
    return Outcome(
        rounds,
        one,
        rounds * one + (min(train, strategy.exchange) if task.staleness else 0.0),
        strategy.rows * task.tokens * task.local_steps / one,
    )


def strategies(task: Task, topology: Topology, nodes: Mapping[str, Node]) -> list[Strategy]:
    """Return three strategies: the planner's choice, a pipeline of each client over its ranks, and a pipeline
    of each cluster over all its ranks. A client's step has the same rows in all of them.
    """
    return [
        _planned(task, topology, nodes),
        *(_pipelined(scope, task, topology, nodes) for scope in ("client", "cluster")),
    ]


def _planned(task: Task, topology: Topology, nodes: Mapping[str, Node]) -> Strategy:
    try:
        found = plan(task, topology, nodes)
    except PlanError as error:
        return Strategy("planned", str(error).partition(". Each of these")[0])
    memories = [c.forecast.memory for c in found.clusters]
    seconds = [c.forecast.seconds for c in found.clusters]
    return Strategy(
        "planned",
        f"engine.tier={found.setting.tier}, {found.setting.accumulation} x {found.setting.micro_batch} rows "
        "a rank",
        max(m.gpu_bytes for m in memories),
        ram_bytes=max(m.ram_bytes for m in memories),
        step=max(s.total for s in seconds),
        rows=_rows(task, topology),
        exchange=max(s.exchange for s in seconds),
    )


def _rows(task: Task, topology: Topology) -> int:
    """Return the rows of all clients in a local step."""
    return task.rows * sum(len(client.ranks) for client in topology.clients)


def _pipelined(scope: str, task: Task, topology: Topology, nodes: Mapping[str, Node]) -> Strategy:
    name = f"engine.pipeline={scope}"
    # Ranks of a pipeline -> for each of its clients, the index of the gateway among the ranks.
    pipelines: dict[tuple[int, ...], list[int]] = {}
    for client in topology.clients:
        ranks = client.ranks if scope == "client" else topology.cluster_of(client.cluster).ranks
        pipelines.setdefault(tuple(ranks), []).append(ranks.index(client.gateway))
    if any(len(ranks) < 2 for ranks in pipelines):
        return Strategy(name, "some would have one rank only")
    if task.method == "full":
        return Strategy(name, "trains adapters inside the blocks only")
    if (most := max(map(len, pipelines))) > task.shape.layers:
        return Strategy(name, f"{most} ranks for {task.shape.layers} blocks")
    distinct: list[tuple[list[RankProfile], list[int]]] = []
    for ranks, owners in pipelines.items():
        profiles = [profile_of(topology, nodes, rank) for rank in ranks]
        distinct += [(profiles, owners)] if (profiles, owners) not in distinct else []
    # A client's step has as many rows as its ranks would take without a pipeline; in a cluster of unequal
    # clients, as many as the largest one has.
    found = [
        _best(scope, task, profiles, owners, task.rows * max(profile.client_ranks for profile in profiles))
        for profiles, owners in distinct
    ]
    fitting = [forecast for forecast in found if forecast is not None]
    if len(fitting) < len(found):
        return Strategy(name, "does not fit: weights and activations of some stage are too large")
    slowest = max(fitting, key=lambda one: one.seconds)
    exchange = max(exchange_s(task, profiles[0]) for profiles, _ in distinct)
    return Strategy(
        name,
        _describe(slowest),
        max(one.device for one in fitting),
        ram_bytes=max(one.ram for one in fitting),
        step=slowest.seconds,
        rows=_rows(task, topology),
        exchange=exchange,
    )


def _best(
    scope: str, task: Task, profiles: Sequence[RankProfile], owners: Sequence[int], rows: int
) -> PipelineForecast | None:
    """Return the pipeline with the fastest division of the rows into micro-batches; None: none fits."""
    found = []
    for micro_batch in (size for size in MICRO_BATCHES if rows % size == 0):
        micros = rows // micro_batch
        found.append(
            cluster_pipeline(task, profiles, owners, micro_batch, micros)
            if scope == "cluster"
            else client_pipeline(task, profiles, len(owners), micro_batch, micros)
        )
    return min(filter(None, found), key=lambda one: one.seconds, default=None)


def _describe(forecast: PipelineForecast) -> str:
    sizes = (
        "blocks loaded by turns"
        if forecast.loads
        else f"stages of {'+'.join(map(str, forecast.chunks))} blocks"
    )
    return f"{sizes}, idle {forecast.bubble:.0%}" + (
        ", computed again" if forecast.recompute and not forecast.loads else ""
    )


@dataclass(frozen=True)
class Scale:
    """Rounds of many clients, each on a server of its own.

    Attributes:
        train: seconds of a round's local steps.
        plain: seconds of an exchange in the clear. plain_sent, plain_cpu: bytes that each client
            sends in it, and its CPU-seconds.
        masked: seconds of a round's two masked exchanges, of its header and of its update. sent: bytes that
            each client sends in them.
        link, streams, members: the parts of `masked` (`many_clients.ExchangeCost`).
        masked_cpu: CPU-seconds of it for each client.
        round: seconds of a round whose masked exchange follows the training.
        hidden: seconds of a round whose masked exchange is hidden behind the next round's training.
        rate: tokens/s of all clients together with the latter.
    """

    clients: int
    train: float
    plain: float
    plain_sent: float
    plain_cpu: float
    masked: float
    sent: float
    link: float
    streams: float
    members: float
    masked_cpu: float
    round: float
    hidden: float
    rate: float


def scale(task: Task, strategy: Strategy, link_rate: float, clients: int) -> Scale:
    """Extrapolate a client's strategy to a number of clients.

    Args:
        strategy: of one client on one server.
        link_rate: bytes/s of each server's link.
    """
    nbytes = 4 * task.trainable
    train = task.local_steps * strategy.seconds
    plain = plain_cost(nbytes, link_rate, clients)
    masked = masked_cost(nbytes, link_rate, clients)
    hidden = max(train, masked.seconds)
    return Scale(
        clients,
        train,
        plain.seconds,
        plain_sent=plain.sent,
        plain_cpu=plain.cpu,
        masked=masked.seconds,
        sent=masked.sent,
        link=masked.link,
        streams=masked.streams,
        members=masked.members,
        masked_cpu=masked.cpu,
        round=train + masked.seconds,
        hidden=hidden,
        rate=clients * strategy.rows * task.tokens * task.local_steps / hidden,
    )


@dataclass(frozen=True)
class ModelSimulation:
    """The simulated training of one model.

    Attributes:
        tasks: (job, task, strategies with their outcomes; None where a strategy is impossible).
        alone: the fastest strategy of a client that has a server to itself.
        scales: rounds of many such clients.
    """

    tasks: list[tuple[Job, Task, list[tuple[Strategy, Outcome | None]]]]
    alone: Strategy
    scales: list[Scale]


def simulate_model(
    jobs: Sequence[tuple[Job, Task, Topology, Mapping[str, Node]]],
    alone: Sequence[tuple[Task, Topology, Mapping[str, Node]]],
    epochs: int,
    counts: Sequence[int],
) -> ModelSimulation:
    """Simulate the training of one model.

    Args:
        jobs: each with its task and its topology.
        alone: one client by itself on each kind of host; the slowest one counts at scale.
        epochs: passes over each job's rows.
        counts: numbers of clients to extrapolate to.
    """
    tasks = []
    for job, task, topology, nodes in jobs:
        outcomes: list[tuple[Strategy, Outcome | None]] = []
        for strategy in strategies(task, topology, nodes):
            is_possible = strategy.step is not None
            outcomes.append((strategy, outcome(strategy, task, epochs * job.rows) if is_possible else None))
        tasks.append((job, task, outcomes))
    fastest = []
    for task, topology, nodes in alone:
        # A cluster's pipeline is left out: a client that is alone has no cluster.
        possible = [one for one in strategies(task, topology, nodes)[:2] if one.step is not None]
        if not possible:
            return ModelSimulation(tasks, Strategy("none", "does not fit on one of the hosts by itself"), [])
        fastest.append((task, min(possible, key=lambda strategy: strategy.seconds), nodes))
    task, slowest, _ = max(fastest, key=lambda one: one[1].seconds / one[1].rows)
    link_rate = min(node.link_rate for _, _, nodes in fastest for node in nodes.values())
    return ModelSimulation(tasks, slowest, [scale(task, slowest, link_rate, count) for count in counts])
