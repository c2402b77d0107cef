"""The LoRA rank of each client and of each rank's engine (`adapter.rank_by_client`).

`auto` is resolved from the configuration, the hostfile and a probe's file, which all ranks have, so that all
come to the same. The journal stores the resolved ranks. A resumed run whose hosts lead to others is refused
as one with another configuration.
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from fedspeed.cluster.hostfile import Host
from fedspeed.cluster.topology import Topology, topology_of
from fedspeed.config.deepspeed import zero_stage
from fedspeed.config.run import RunConfig
from fedspeed.engine.capabilities import Kind
from fedspeed.errors import PlanError
from fedspeed.models.lora_ranks import client_ranks, ranks_text
from fedspeed.models.planned_shape import planned_shape
from fedspeed.planner.client_ranks import rank_that_fits, shortage_of_smallest
from fedspeed.planner.hardware import GIB, Node, node_of
from fedspeed.planner.profiles import profile_of
from fedspeed.planner.task import task_of
from fedspeed.session.forecast import configured_setting, predictable_tier
from fedspeed.session.planner_inputs import read_probe_file
from fedspeed.session.request import Job, RunRequest


def with_client_ranks(request: RunRequest, hosts: Sequence[Host]) -> tuple[RunRequest, str]:
    """Resolve adapter.rank_by_client=auto.

    Args:
        request: whose model.dtype is resolved. hosts: in the order of their ranks.

    Returns:
        the request with the ranks, and a text that names them; empty where all clients have
        adapter.lora_rank.

    Raises:
        PlanError: a client's devices do not have the memory for any rank, or the planner does not model how
            the run computes. ModelError: the dimensions of the base are not known.
    """
    adapter = request.config.adapter
    count = request.config.data.clients
    if adapter.rank_by_client != "auto":
        return request, ranks_text(client_ranks(adapter, count)) if adapter.rank_by_client else ""
    chosen = _chosen(request, hosts)
    request = request.with_client_ranks([lora_rank for lora_rank, _ in chosen])
    parts = []
    clients = iter(range(count))
    for (lora_rank, why), same in groupby(chosen):
        numbers = [next(clients) for _ in same]
        parts.append(f"{ranks_text([lora_rank] * len(numbers), numbers[0])} (auto: {why})")
    return request, ", ".join(parts)


def _chosen(request: RunRequest, hosts: Sequence[Host]) -> list[tuple[int, str]]:
    """Return the rank of each client, and the reason for it."""
    config = request.config
    tier = predictable_tier(config, request.deepspeed)
    if tier is None:
        raise PlanError(
            "adapter.rank_by_client=auto: the planner does not know what a rank of this engine needs "
            "(pipelines, and ZeRO-3 with engine.tier=stock); write the ranks, such as "
            "adapter.rank_by_client={0: 16, 3: 4}"
        )
    topology = topology_of(config, hosts)
    nodes = _known_nodes(config, topology, hosts)
    if not nodes:
        return [(config.adapter.lora_rank, _UNKNOWN)] * config.data.clients
    shape = planned_shape(config.model.base)
    task = task_of(config, request.deepspeed, shape, [node.device for node in nodes.values()])
    chosen = []
    for client in topology.clients:
        names = {topology.placement(rank).host for rank in client.ranks}
        if not names <= nodes.keys():
            chosen.append((config.adapter.lora_rank, _UNKNOWN))
            continue
        profiles = [profile_of(topology, nodes, rank) for rank in client.ranks]
        setting = configured_setting(config, task, tier, profiles[0])
        lora_rank = rank_that_fits(
            task,
            setting,
            profiles,
            block_inputs=config.engine.block_inputs,
            activation_gib=config.engine.activation_gib,
        )
        if lora_rank is None:
            raise PlanError(
                f"adapter.rank_by_client=auto: client {client.client} does not have the memory even for LoRA "
                f"rank 1 with engine.tier={tier}: {shortage_of_smallest(task, setting, profiles)}; choose "
                "other engine settings (`fedspeed plan` proposes them), or write the ranks"
            )
        chosen.append((lora_rank, _memory_text([nodes[name] for name in sorted(names)])))
    return chosen


_UNKNOWN = "its devices are not known, so adapter.lora_rank"


def _known_nodes(config: RunConfig, topology: Topology, hosts: Sequence[Host]) -> dict[str, Node]:
    """Return the hardware of those training hosts of which it is stated or measured, by name."""
    probes = [read_probe_file(Path(config.cluster.probe))] if config.cluster.probe else []
    training = {place.host for place in topology.ranks if place.clients}
    nodes = {}
    for host in hosts:
        if host.name not in training:
            continue
        try:
            nodes[host.name] = node_of(host, probes)
        except PlanError:  # neither measured nor a known card
            continue
    return nodes


def _memory_text(nodes: Sequence[Node]) -> str:
    """Describe the memory that a client's adapter fits in: that of its smallest device."""
    smallest = min(nodes, key=lambda node: node.device.memory or node.ram)
    if smallest.device.kind == "cpu":
        return f"fits {smallest.ram / GIB:.1f} GiB of RAM"
    return f"fits {smallest.device.memory / GIB:.1f} GiB of {smallest.device.name}"


def engine_rank(job: Job, kind: Kind) -> int:
    """Return the LoRA rank of this rank's engine: the largest of the clients that it carries.

    ZeRO-3 by DeepSpeed gathers modules in an order that depends on their sizes, and a pipeline has every
    client's adapter on all its stages. There it is the largest of the clients of the whole torch world.

    Args:
        kind: of the engine.
    """
    config = job.config
    lora_ranks = client_ranks(config.adapter, config.data.clients)
    clients = job.place.clients
    # Targets that the configuration names may be outside the blocks, which only a stock engine trains.
    may_be_stock = kind == "stock" or not isinstance(config.adapter.targets, str)
    if config.engine.pipeline != "none" or (may_be_stock and zero_stage(job.request.deepspeed) == 3):
        clients = tuple(c.client for c in job.topology.clients if c.ranks[0] in job.world)
    return max(lora_ranks[client] for client in clients)
