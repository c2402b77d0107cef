"""Builds a client's pipeline over its own ranks."""

from deepspeed import comm as dist
from torch import nn

from fedspeed.engine.builders.pipeline import fill_store, make_player, make_slots, split_model
from fedspeed.engine.groups import Groups
from fedspeed.engine.pipeline.client import ClientPipeline
from fedspeed.engine.spec import EngineContext, EngineSpec


def build(net: nn.Module, spec: EngineSpec, context: EngineContext, groups: Groups) -> ClientPipeline:
    """Build it from a model on the meta device. Collective over the torch world, which is the client's
    ranks.
    """
    me = dist.get_rank()
    cut = split_model(net, spec)
    embeds = me == 0
    heads = me == cut.layout.holders[-1]
    store = fill_store(net, spec, context, groups, cut=cut, embeds=embeds, heads=heads)
    player = make_player(net, spec, store, cut)
    count = min(context.clients, spec.engine.client_slots or context.clients)
    states = make_slots(net, spec, context, groups, cut=cut, count=count)
    return ClientPipeline(net, states, groups, loads=cut.loads, clock=context.clock, **player)
