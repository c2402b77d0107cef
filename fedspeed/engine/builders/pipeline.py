"""The common part of pipeline builders. Each rank of the torch world reads only its own part of the model."""

from dataclasses import dataclass

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import nn
from transformers import PreTrainedModel

from fedspeed.engine.activation_policy import FixedActivationPolicy
from fedspeed.engine.base.placement import layout_of, pipeline_section, pipeline_tier, stage_section
from fedspeed.engine.base.store import BaseStore
from fedspeed.engine.builders.common import make_client_slot, needed_parameters, put_buffers_on_device
from fedspeed.engine.builders.store import StoreBuilder
from fedspeed.engine.client_state import ClientState
from fedspeed.engine.ds_config import model_facts, resolve_autos
from fedspeed.engine.groups import Groups, StageMpu, single_rank_groups
from fedspeed.engine.pipeline.engine import FederatedPipelineEngine, FederatedPipelineModule
from fedspeed.engine.pipeline.pipelined import PipelineParts
from fedspeed.engine.spec import EngineContext, EngineSpec
from fedspeed.engine.stage import Stage
from fedspeed.errors import FedSpeedError
from fedspeed.models.blocks import Anatomy, anatomy, trained_outside
from fedspeed.models.loading import materialise
from fedspeed.schedule.layout import Layout


@dataclass(frozen=True)
class PipelineSplit:
    """Describe how a model is divided over the ranks of a pipeline.

    Attributes:
        parts: the model's parts.
        layout: which rank computes which blocks.
        tier: where a rank stores its part of the base.
        loads: whether chunks are loaded and released during a pass.
        names: by rank, the trainable tensors of its blocks.
    """

    parts: Anatomy
    layout: Layout
    tier: str
    loads: bool
    names: list[list[str]]


def split_model(net: nn.Module, spec: EngineSpec) -> PipelineSplit:
    """Decide which rank computes which blocks. Collective over the torch world.

    Raises:
        FedSpeedError: engine.tier or engine.cuts do not fit, or nothing trains in a stage.
    """
    ranks = dist.get_world_size()
    parts = anatomy(net)
    engine = spec.engine
    tier = pipeline_tier(engine, spec.deepspeed, trained_outside(net))
    layout = _agreed(layout_of(engine, tier, len(parts.blocks), ranks))
    block_of = {p: b for b, block in enumerate(parts.blocks) for p in block.parameters()}
    trained = [(n, block_of[p]) for n, p in sorted(net.named_parameters()) if p.requires_grad]
    names = [[n for n, b in trained if b in layout.blocks_of(rank)] for rank in range(ranks)]
    if idle := [rank for rank, trainable in enumerate(names) if not trainable]:
        raise FedSpeedError(
            f"engine.pipeline={engine.pipeline}: nothing trains in the blocks of stage {idle[0]}; choose "
            "adapter.targets in every block, or other engine.cuts"
        )
    return PipelineSplit(parts, layout, tier, tier != "resident", names)


def fill_store(
    net: nn.Module,
    spec: EngineSpec,
    context: EngineContext,
    groups: Groups,
    *,
    split: PipelineSplit,
    embeds: bool,
    heads: bool,
) -> BaseStore:
    """Read this rank's part of the weights into a store.

    Args:
        embeds: whether this rank embeds micro-batches.
        heads: whether this rank has labels, and so computes the head.
    """
    parts = split.parts
    blocks = split.layout.blocks_of(dist.get_rank())
    only = needed_parameters(net, parts, blocks, {parts.embedding: embeds, parts.head: heads})
    builder = StoreBuilder(
        net,
        parts,
        split.tier,
        spec.engine,
        groups=single_rank_groups(groups),
        ds_config=spec.deepspeed,
        nvme=context.nvme,
        only=only,
    )
    materialise(net, spec.model, spec.adapter, seed=context.seed, place=builder.place, only=only)
    put_buffers_on_device(net)
    return builder.seal(context.clock)


def make_slots(
    net: nn.Module,
    spec: EngineSpec,
    context: EngineContext,
    groups: Groups,
    *,
    split: PipelineSplit,
    count: int,
) -> list[ClientState]:
    """Make `count` client slots over the trainable tensors of this rank's stage."""
    named = dict(net.named_parameters())
    config = resolve_autos(stage_section(spec.deepspeed), model_facts(net), context.nvme, shared_base=False)
    states = []
    for _ in range(count):
        mpu = StageMpu(single_rank_groups(groups), groups.cluster, dist.get_world_size())
        values = {name: named[name].data for name in split.names[dist.get_rank()]}
        states.append(
            make_client_slot(values, spec.train, config, mpu=mpu, groups=single_rank_groups(groups))
        )
    return states


def make_parts(
    net: PreTrainedModel, spec: EngineSpec, store: BaseStore, split: PipelineSplit, *, loads: bool
) -> PipelineParts:
    """Make the parts of a `PipelinedEngine`. Collective over the torch world.

    Args:
        loads: whether chunks are loaded and released during a pass.
    """
    layout = split.layout
    module = FederatedPipelineModule(split.parts.blocks, layout.chunks, layout.holders, dist.get_world_size())
    pipe = FederatedPipelineEngine(module, pipeline_section(spec.deepspeed))
    # A graph refers to the weights of its blocks, so where these are released blocks are computed again.
    policy = FixedActivationPolicy(graphs=not (split.loads or spec.engine.activation_checkpointing))
    stage = Stage(net, split.parts, store, layout.chunks, policy=policy, logits_mib=spec.engine.logits_mib)
    return PipelineParts(store=store, pipe=pipe, stage=stage, layout=layout, loads=loads)


def _agreed(layout: Layout) -> Layout:
    """Return the first rank's layout: ranks may have different measurements of the machines
    (cluster.probe).
    """
    table = torch.tensor(
        [(chunk.start, chunk.stop, holder) for chunk, holder in zip(layout.chunks, layout.holders)],
        device=get_accelerator().current_device_name(),
    )
    dist.broadcast(table, 0)
    rows = table.tolist()
    return Layout(tuple(range(start, stop) for start, stop, _ in rows), tuple(holder for *_, holder in rows))
