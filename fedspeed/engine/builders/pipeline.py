"""What builders of pipelines have in common: a part of the model on each rank of the torch world; nothing is
read of the others' parts.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from fedspeed.engine.activation_policy import FixedActivationPolicy
from fedspeed.engine.base.choose import layout_of, pipeline_section, pipeline_tier, stage_section
from fedspeed.engine.base.store import BaseStore
from fedspeed.engine.builders.common import make_client_slot, put_buffers_on_device
from fedspeed.engine.builders.store import StoreBuilder
from fedspeed.engine.client_state import ClientState
from fedspeed.engine.ds_config import finish, model_facts
from fedspeed.engine.groups import Groups, StageMpu, alone
from fedspeed.engine.pipeline.engine import FederatedPipelineEngine, FederatedPipelineModule
from fedspeed.engine.spec import EngineContext, EngineSpec
from fedspeed.engine.stage import Stage
from fedspeed.errors import FedSpeedError
from fedspeed.models.blocks import Anatomy, anatomy, trained_outside
from fedspeed.models.loading import materialise
from fedspeed.schedule.layout import Layout


@dataclass(frozen=True)
class PipelineSplit:
    """How a model is divided over the ranks of a pipeline.

    Attributes:
        loads: whether chunks are loaded and released. names: by rank, the trainable tensors of its blocks.
    """

    parts: Anatomy
    layout: Layout
    tier: str
    loads: bool
    names: list[list[str]]


def split_model(net: nn.Module, spec: EngineSpec) -> PipelineSplit:
    """Decide which rank holds which blocks. Collective over the torch world.

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
    if idle := [rank for rank, own in enumerate(names) if not own]:
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
    cut: PipelineSplit,
    embeds: bool,
    heads: bool,
) -> BaseStore:
    """Read this rank's part of the weights into a store.

    Args:
        embeds, heads: whether this rank embeds micro-batches, and holds labels.
    """
    parts = cut.parts
    only = _needed(
        net, parts, cut.layout.blocks_of(dist.get_rank()), {parts.embedding: embeds, parts.head: heads}
    )
    builder = StoreBuilder(
        net,
        parts,
        cut.tier,
        spec.engine,
        groups=alone(groups),
        ds_config=spec.deepspeed,
        nvme=context.nvme,
        only=only,
    )
    materialise(net, spec.model, spec.adapter, seed=context.seed, place=builder.place, only=only)
    put_buffers_on_device(net)
    return builder.seal(context.clock)


def _needed(
    net: nn.Module, parts: Anatomy, blocks: Collection[int], ends: dict[nn.Module, bool]
) -> set[nn.Parameter]:
    """The parameters of some blocks, of the ends that are needed here, and of what is neither block nor
    end.
    """
    inside = {p for module in (*parts.blocks, *ends) for p in module.parameters()}
    held = [*(parts.blocks[b] for b in blocks), *(end for end, here in ends.items() if here)]
    return {p for p in net.parameters() if p not in inside} | {
        p for module in held for p in module.parameters()
    }


def make_slots(
    net: nn.Module,
    spec: EngineSpec,
    context: EngineContext,
    groups: Groups,
    *,
    cut: PipelineSplit,
    count: int,
) -> list[ClientState]:
    """Make client slots over what trains in this rank's stage."""
    named = dict(net.named_parameters())
    config = finish(stage_section(spec.deepspeed), model_facts(net), context.nvme, shared_base=False)
    states = []
    for _ in range(count):
        mpu = StageMpu(alone(groups), groups.cluster, dist.get_world_size())
        values = {name: named[name].data for name in cut.names[dist.get_rank()]}
        states.append(make_client_slot(values, spec.train, config, mpu=mpu, groups=alone(groups)))
    return states


def make_player(net: nn.Module, spec: EngineSpec, store: BaseStore, cut: PipelineSplit) -> dict:
    """Make what executes: arguments of a `PipelinedEngine`. Collective over the torch world."""
    layout = cut.layout
    module = FederatedPipelineModule(cut.parts.blocks, layout.chunks, layout.holders, dist.get_world_size())
    pipe = FederatedPipelineEngine(module, pipeline_section(spec.deepspeed))
    # Where weights do not stay, what the way back needs of them is computed again.
    policy = FixedActivationPolicy(graphs=not (cut.loads or spec.engine.activation_checkpointing))
    stage = Stage(net, cut.parts, store, layout.chunks, policy=policy)
    return {"store": store, "pipe": pipe, "stage": stage, "layout": layout}


def _agreed(layout: Layout) -> Layout:
    """The first rank's: each may know other measurements of the machines (cluster.probe)."""
    table = torch.tensor(
        [(chunk.start, chunk.stop, holder) for chunk, holder in zip(layout.chunks, layout.holders)],
        device=get_accelerator().current_device_name(),
    )
    dist.broadcast(table, 0)
    rows = table.tolist()
    return Layout(tuple(range(start, stop) for start, stop, _ in rows), tuple(holder for *_, holder in rows))
