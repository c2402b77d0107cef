"""What is simulated: a model, a task and machines, and how each method is configured and placed on them. No
torch, no weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from fedspeed.cluster.hostfile import Host
from fedspeed.cluster.topology import Topology, place_clients
from fedspeed.config.deepspeed import merge
from fedspeed.config.load import load
from fedspeed.config.run import RunConfig
from fedspeed.models.families.shape import ModelShape
from fedspeed.models.planned_shape import planned_shape
from fedspeed.planner.hardware import Node, node_of
from fedspeed.planner.plan import RankProfile, Task
from fedspeed.planner.profiles import profile_of
from fedspeed.planner.task import task_of

BASELINES = (
    "fs_llm",
    "fs_llm_offload",
    "fate_llm",
    "fedavg_lora",
    "zero3_offload",
    "fedbiot",
    "m2fedsa",
    "spry",
    "spry_iteration",
)
# Whose presets do not say how many rows a batch has.
WITHOUT_BATCH = ("fedavg_lora", "zero3_offload")
SAME_ADAPTER = ("adapter.lora_rank=8", "adapter.targets=attention", "adapter.dropout=0")
SAME = (*SAME_ADAPTER, "train.local_steps=10")
FUSED = "c_attn"  # in models whose queries, keys and values are one matrix


@dataclass(frozen=True)
class Case:
    """A training to simulate.

    Attributes:
        shape: of the model. clients: of the run. epoch: training rows of all clients together. tokens: of
            every row. rows: of a local step on each rank. hosts: all machines. settings: key=value
            arguments of the method.
    """

    shape: ModelShape
    clients: int
    epoch: int
    tokens: int
    rows: int
    hosts: tuple[Host, ...]
    settings: tuple[str, ...] = ()

    @property
    def devices(self) -> str:
        """Return the kinds of cards, each once, in the hostfile's order."""
        return ", ".join(dict.fromkeys(str(host.gpu) for host in self.hosts))


@dataclass(frozen=True)
class Placement:
    """A method on a case's machines.

    Attributes:
        task: of local steps by gradients over the whole base, before the method changes it.
        ranks: profile of each training rank, in their order; those of one client are alike.
        server: profile of the server's first rank; None: no server.
    """

    config: RunConfig
    task: Task
    topology: Topology
    ranks: tuple[RankProfile, ...]
    server: RankProfile | None

    @property
    def kinds(self) -> dict[str, RankProfile]:
        """Return a rank of each kind of card, by the card's name."""
        return {rank.node.device.name: rank for rank in reversed(self.ranks)}

    @property
    def client_ranks(self) -> int:
        """Return the ranks of a client."""
        return self.ranks[0].client_ranks

    @property
    def link_rate(self) -> float:
        """Return the bytes/s of the slowest link."""
        return min(rank.node.link_rate for rank in self.ranks)


def capped(hosts: Sequence[Host], cap_gib: float | None) -> tuple[Host, ...]:
    """Return hosts whose cards have at most `cap_gib` of memory; None: as they are."""
    if cap_gib is None:
        return tuple(hosts)
    return tuple(
        replace(host, gpu_mem_gib=min(cap_gib, node_of(host).device.memory / 2**30 / 0.93)) for host in hosts
    )


def placed(method: str, case: Case, *, published: bool = False) -> Placement:
    """Place a method on the machines of a case. The first host is the server of a method that has one.

    Args:
        method: name of a baseline, or lora_average. published: whether adapter and steps of a round are those
            of the method's preset instead of the common ones.

    Raises:
        FedSpeedError: the method cannot train this model.
    """
    config, deepspeed = _configuration(
        method, published, is_fused=FUSED in case.shape.linear_names, settings=case.settings
    )
    has_server = config.has_server
    hosts = [replace(case.hosts[0], role="server"), *case.hosts[1:]] if has_server else list(case.hosts)
    topology = place_clients(hosts, case.clients, "auto", server=has_server)
    nodes = {host.name: node_of(host) for host in hosts}
    working = [rank for rank in topology.ranks if rank.clients]
    devices = [nodes[rank.host].device for rank in working]
    task = task_of(config, deepspeed, case.shape, devices, rows=case.rows)
    return Placement(
        config,
        replace(task, clients=case.clients, tokens=case.tokens),
        topology,
        tuple(profile_of(topology, nodes, rank.world_rank) for rank in working),
        _server(topology, nodes, hosts[0]) if has_server else None,
    )


def _server(topology: Topology, nodes: dict[str, Node], host: Host) -> RankProfile:
    """Return the profile of one rank of the server, which has its host for itself."""
    return RankProfile(
        replace(nodes[host.name], name="", assumed=()),
        ranks_here=1,
        client_ranks=1,
        cluster_ranks=1,
        cluster_nodes=1,
        carried=1,
        participants=len(topology.participants),
        participants_here=1,
    )


@lru_cache(maxsize=64)
def _configuration(
    method: str, published: bool, *, is_fused: bool, settings: tuple[str, ...]
) -> tuple[RunConfig, dict[str, Any]]:
    """Return the configuration of a method and its DeepSpeed section; from its preset, if it has one."""
    overrides = () if published else SAME
    if published and is_fused:
        overrides = ("adapter.targets=attention",)
    rows = ("federation.public_rows=public.jsonl",) if method == "fedbiot" else ()
    own = [f"federation.method.name={method}", "model.base=any", "data.clients=16", *rows]
    loaded = load(None, [*own, *overrides, *settings])
    return loaded.config, merge(loaded.config.deepspeed, loaded.config, loaded.folder)


@lru_cache(maxsize=16)
def shape_of(model: str) -> ModelShape:
    """Return the dimensions of a known model."""
    return planned_shape(model)
