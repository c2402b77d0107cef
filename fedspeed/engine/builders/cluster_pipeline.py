"""Build a pipeline over all ranks of a cluster, for all its clients."""

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedModel

from fedspeed.engine.builders.pipeline import fill_store, make_parts, make_slots, split_model
from fedspeed.engine.groups import Groups
from fedspeed.engine.pipeline.cluster import ClusterPipeline
from fedspeed.engine.spec import EngineContext, EngineSpec


def build(net: PreTrainedModel, spec: EngineSpec, context: EngineContext, groups: Groups) -> ClusterPipeline:
    """Build the engine from a model on the meta device. Collective over the cluster's torch world."""
    rank = dist.get_rank()
    count = min(context.clients, spec.engine.client_slots or context.clients)
    owners, own_slots = _global_slots(context.client_sets, rank, count)
    split = split_model(net, spec)
    has_data = rank in owners
    store = fill_store(net, spec, context, groups, split=split, embeds=has_data, heads=has_data)
    parts = make_parts(net, spec, store, split, loads=False)
    states = make_slots(net, spec, context, groups, split=split, count=len(owners))
    return ClusterPipeline(
        net,
        states,
        groups,
        owners=owners,
        own_slots=own_slots,
        stage_names=split.names,
        parts=parts,
        clock=context.clock,
    )


def _global_slots(client_sets: list[tuple[int, ...]], rank: int, count: int) -> tuple[list[int], list[int]]:
    """Assign numbers to the client slots of all ranks of the cluster. Collective over the cluster.

    Args:
        count: number of slots of this rank.

    Returns:
        (by global slot, the first rank of its client; the global slots of this rank's clients).
    """
    device = get_accelerator().current_device_name()
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, torch.tensor([count], device=device))
    owners: list[int] = []
    own_slots: list[int] = []
    for ranks in client_sets:
        if rank in ranks:
            own_slots = list(range(len(owners), len(owners) + count))
        owners += [ranks[0]] * int(counts[ranks[0]])
    return owners, own_slots
