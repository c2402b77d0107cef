"""Build a client's pipeline over its own ranks."""

from deepspeed import comm as dist
from transformers import PreTrainedModel

from fedspeed.engine.builders.pipeline import fill_store, make_parts, make_slots, split_model
from fedspeed.engine.groups import Groups
from fedspeed.engine.pipeline.client import ClientPipeline
from fedspeed.engine.spec import EngineContext, EngineSpec


def build(net: PreTrainedModel, spec: EngineSpec, context: EngineContext, groups: Groups) -> ClientPipeline:
    """Build the engine from a model on the meta device. Collective over the torch world, which is the
    client's ranks.
    """
    rank = dist.get_rank()
    split = split_model(net, spec)
    last = split.layout.holders[-1]
    store = fill_store(net, spec, context, groups, split=split, embeds=rank == 0, heads=rank == last)
    parts = make_parts(net, spec, store, split, loads=split.loads)
    count = min(context.clients, spec.engine.client_slots or context.clients)
    states = make_slots(net, spec, context, groups, split=split, count=count)
    return ClientPipeline(net, states, groups, parts=parts, clock=context.clock)
