"""Build a rank's engine: create the model on the meta device, add the adapter, read the weights block by
block, and start DeepSpeed.
"""

from importlib import import_module

from fedspeed.engine.attention import choose_attention
from fedspeed.engine.capabilities import Kind, kind_of
from fedspeed.engine.client_engine import ClientEngine
from fedspeed.engine.groups import make_groups
from fedspeed.engine.spec import EngineContext, EngineSpec
from fedspeed.models.blocks import keep_blocks, trained_outside
from fedspeed.models.loading import meta_model

__all__ = ["BUILDERS", "EngineContext", "EngineSpec", "build_engine"]

# By kind, the module whose `build(net, spec, context, groups)` builds the engine. A module is imported when
# it is needed, since each imports the parts of DeepSpeed that it uses.
BUILDERS: dict[Kind, str] = {
    "stock": "fedspeed.engine.builders.stock",
    "streamed": "fedspeed.engine.builders.streamed",
    "client_pipeline": "fedspeed.engine.builders.client_pipeline",
    "cluster_pipeline": "fedspeed.engine.builders.cluster_pipeline",
    "split": "fedspeed.engine.builders.split",
}


def build_engine(spec: EngineSpec, context: EngineContext) -> ClientEngine:
    """Build the engine of this rank. Collective over the cluster's torch world, which must have been joined
    (`world.join_world`).

    Raises:
        ModelError: the model folder, its weights or the adapter do not fit the configuration.
        FedSpeedError: the tier has no room for the base.
    """
    groups = make_groups(context.client_sets)
    net = meta_model(spec.model, spec.adapter)
    if spec.blocks is not None:
        keep_blocks(net, spec.blocks)
    choose_attention(net)
    frozen = any(not p.requires_grad for p in net.parameters())
    kind = spec.kind
    if kind != "split":
        kind = kind_of(spec.engine, spec.deepspeed, frozen=frozen, outside=trained_outside(net))
    return import_module(BUILDERS[kind]).build(net, spec, context, groups)
