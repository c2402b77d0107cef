"""What training would take on machines that are not here: the planner's choice and both pipelines, on the
mission's models and tasks; and how rounds grow with the number of clients. Pure.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedspeed.cluster.topology import Topology
from fedspeed.errors import PlanError
from fedspeed.planner.hardware import Node
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
RELAYS = 2  # of an update's cells, on their strategy
# CPU-seconds of a masked exchange for each byte of the update: by itself, and for the key stream with each
# other participant. Least squares through the 3, 9 and 16 clients of benchmarks/results/anonymous.md.
MASK_S = 1.3e-9
STREAM_S = 0.22e-9
STATES, MESSAGE_S = 11, 5e-5  # of an anonymous exchange; of each small message between two participants


@dataclass(frozen=True)
class Job:
    """One of the mission's tasks: training rows of all clients together."""

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
    """One strategy to train; with `step` None it is none, and `note` says why.

    Attributes:
        device_bytes: of the fullest device. ram_bytes: of the fullest node.
        step: seconds of one local step of every client, of the slowest cluster. rows: of all clients in it.
        exchange: seconds of a round's exchange.
    """

    name: str
    note: str
    device_bytes: int = 0
    ram_bytes: int = 0
    step: float | None = None
    rows: int = 0
    exchange: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """Of a whole training. Seconds; `rate`: tokens a second of all clients together, exchange and all."""

    rounds: int
    round: float
    whole: float
    rate: float


def outcome(strategy: Strategy, task: Task, rows: int) -> Outcome:
    """A training that sees `rows` rows in all. With federation.staleness=1 the exchange hides behind the next
    round's local steps.
    """
    train = task.local_steps * strategy.step
    one = max(train, strategy.exchange) if task.staleness else train + strategy.exchange
    rounds = math.ceil(rows / (strategy.rows * task.local_steps))
    return Outcome(
        rounds,
        one,
        rounds * one + (min(train, strategy.exchange) if task.staleness else 0.0),
        strategy.rows * task.tokens * task.local_steps / one,
    )


def strategies(task: Task, topology: Topology, nodes: Mapping[str, Node]) -> list[Strategy]:
    """The planner's choice, each client's pipeline over its ranks, and each cluster's over all of them; all
    with the same rows in a step of a client.
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
    """Of all clients in a local step."""
    return task.rows * sum(len(client.ranks) for client in topology.clients)


def _pipelined(scope: str, task: Task, topology: Topology, nodes: Mapping[str, Node]) -> Strategy:
    name = f"engine.pipeline={scope}"
    pipelines: dict[
        tuple[int, ...], list[int]
    ] = {}  # ranks -> the profile among them of each client's gateway
    for client in topology.clients:
        ranks = client.ranks if scope == "client" else topology.cluster_of(client.cluster).ranks
        pipelines.setdefault(tuple(ranks), []).append(ranks.index(client.gateway))
    if any(len(ranks) < 2 for ranks in pipelines):
        return Strategy(name, "some would have one rank only")
    if task.method == "full":
        return Strategy(name, "trains adapters inside the blocks only")
    if (most := max(map(len, pipelines))) > task.shape.layers:
        return Strategy(name, f"{most} ranks for {task.shape.layers} blocks")
    kinds: list[tuple[list[RankProfile], list[int]]] = []  # different ones only
    for ranks, owners in pipelines.items():
        profiles = [profile_of(topology, nodes, rank) for rank in ranks]
        kinds += [(profiles, owners)] if (profiles, owners) not in kinds else []
    # A client's step has the rows that all of its ranks would take by themselves; in a cluster of unlike
    # clients, those of the largest.
    found = [
        _best(scope, task, profiles, owners, task.rows * max(profile.client_ranks for profile in profiles))
        for profiles, owners in kinds
    ]
    if None in found:
        return Strategy(name, "does not fit: weights and activations of some stage are too large")
    slowest = max(found, key=lambda one: one.seconds)
    exchange = max(exchange_s(task, profiles[0]) for profiles, _ in kinds)
    return Strategy(
        name,
        _describe(slowest),
        max(one.device for one in found),
        ram_bytes=max(one.ram for one in found),
        step=slowest.seconds,
        rows=_rows(task, topology),
        exchange=exchange,
    )


def _best(
    scope: str, task: Task, profiles: Sequence[RankProfile], owners: Sequence[int], rows: int
) -> PipelineForecast | None:
    """The fastest division of a client's rows into micro-batches."""
    found = []
    for micro_batch in (size for size in MICRO_BATCHES if rows % size == 0):
        micros = rows // micro_batch
        found.append(
            cluster_pipeline(task, profiles, owners, micro_batch, micros)
            if scope == "cluster"
            else client_pipeline(task, profiles, len(owners), micro_batch, micros)
        )
    return min(filter(None, found), key=lambda one: one.seconds, default=None)


def _describe(found: PipelineForecast) -> str:
    sizes = (
        "blocks loaded by turns" if found.loads else f"stages of {'+'.join(map(str, found.chunks))} blocks"
    )
    return f"{sizes}, idle {found.bubble:.0%}" + (
        ", computed again" if found.recompute and not found.loads else ""
    )


@dataclass(frozen=True)
class Scale:
    """Rounds of many clients, each on a server of its own. Seconds of a round's exchange, in the clear and
    masked; CPU-seconds of the latter for each client; seconds of a masked round, one after the other and with
    the exchange behind the next round's training.
    """

    clients: int
    plain: float
    masked: float
    masked_cpu: float
    round: float
    hidden: float
    rate: float


def scale(task: Task, strategy: Strategy, link_rate: float, clients: int) -> Scale:
    """Args: strategy: of one client, on one server. link_rate: bytes/s of each server's link."""
    nbytes = 4 * task.trainable
    train = task.local_steps * strategy.step
    plain = 2 * (clients - 1) / clients * nbytes / link_rate + 2 * clients * MESSAGE_S
    cpu = nbytes * (MASK_S + STREAM_S * clients)
    masked = (RELAYS + 2) * nbytes / link_rate + STATES * clients * MESSAGE_S + cpu
    hidden = max(train, masked)
    return Scale(
        clients,
        plain,
        masked,
        masked_cpu=cpu,
        round=train + masked,
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
    """Args: alone: one client on each kind of host by itself; the slowest counts at scale."""
    tasks = []
    for job, task, topology, nodes in jobs:
        found = strategies(task, topology, nodes)
        tasks.append((
            job,
            task,
            [
                (strategy, outcome(strategy, task, epochs * job.rows) if strategy.step is not None else None)
                for strategy in found
            ],
        ))
    best = [
        (task, min(able, key=lambda strategy: strategy.step), nodes)
        for task, topology, nodes in alone
        if (
            able := [
                strategy for strategy in strategies(task, topology, nodes)[:2] if strategy.step is not None
            ]
        )
    ]
    if len(best) < len(alone):
        return ModelSimulation(tasks, Strategy("none", "some host holds no strategy by itself"), [])
    task, slowest, _ = max(best, key=lambda one: one[1].step / one[1].rows)
    link_rate = min(node.link_rate for _, _, nodes in best for node in nodes.values())
    return ModelSimulation(tasks, slowest, [scale(task, slowest, link_rate, count) for count in counts])
