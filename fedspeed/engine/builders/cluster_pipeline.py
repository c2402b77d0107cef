"""Builds a pipeline over all ranks of a cluster, for all its clients."""

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from fedspeed.engine.builders.pipeline import fill_store, make_player, make_slots, split_model
from fedspeed.engine.groups import Groups
from fedspeed.engine.pipeline.cluster import ClusterPipeline
from fedspeed.engine.spec import EngineContext, EngineSpec


def build(net: nn.Module, spec: EngineSpec, context: EngineContext, groups: Groups) -> ClusterPipeline:
    """Build it from a model on the meta device. Collective over the cluster's torch world."""
    me = dist.get_rank()
    own = min(context.clients, spec.engine.client_slots or context.clients)
    owners, mine = _places(context.client_sets, me, own)
    cut = split_model(net, spec)
    store = fill_store(net, spec, context, groups, cut=cut, embeds=me in owners, heads=me in owners)
    player = make_player(net, spec, store, cut)
    states = make_slots(net, spec, context, groups, cut=cut, count=len(owners))
    return ClusterPipeline(
        net, states, groups, owners=owners, mine=mine, held=cut.names, clock=context.clock, **player
    )


def _places(client_sets: list[tuple[int, ...]], me: int, own: int) -> tuple[list[int], list[int]]:
    """(of all client slots of the cluster, the first rank of those that carry its client; the slots of this
    rank's clients among them). Collective over the cluster.

    Args:
        own: how many slots this rank has.
    """
    device = get_accelerator().current_device_name()
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, torch.tensor([own], device=device))
    owners = []
    mine = []
    for ranks in client_sets:
        if me in ranks:
            mine = list(range(len(owners), len(owners) + own))
        owners += [ranks[0]] * int(counts[ranks[0]])
    return owners, mine
