"""Build an engine that executes the model layer by layer, with the base in a store."""

from torch import nn

from fedspeed.engine.activations import ActivationBudget
from fedspeed.engine.base.placement import choose_tier, trainable_section
from fedspeed.engine.builders.common import make_client_slot, put_buffers_on_device
from fedspeed.engine.builders.store import StoreBuilder
from fedspeed.engine.ds_config import model_facts, resolve_autos
from fedspeed.engine.groups import ClientMpu, Groups
from fedspeed.engine.layer_major_executor import LayerMajorExecutor
from fedspeed.engine.spec import EngineContext, EngineSpec
from fedspeed.engine.streamed import StreamedEngine
from fedspeed.models.blocks import anatomy, trained_outside
from fedspeed.models.loading import materialise


def build(net: nn.Module, spec: EngineSpec, context: EngineContext, groups: Groups) -> StreamedEngine:
    """Build the engine from a model on the meta device. Collective over the cluster."""
    engine = spec.engine
    parts = anatomy(net)
    tier = choose_tier(engine, spec.deepspeed, frozen=True, outside=trained_outside(net))
    builder = StoreBuilder(
        net, parts, tier, engine, groups=groups, ds_config=spec.deepspeed, nvme=context.nvme
    )
    names = [n for n, p in sorted(net.named_parameters()) if p.requires_grad]
    materialise(net, spec.model, spec.adapter, context.seed, builder.place)
    put_buffers_on_device(net)
    store = builder.seal(context.clock)
    # A client slot's tensors are bound to the model's trainable parameters while the client computes.
    named = dict(net.named_parameters())
    config = resolve_autos(
        trainable_section(spec.deepspeed), model_facts(net), context.nvme, shared_base=False
    )
    states = []
    for _ in range(min(context.clients, engine.client_slots or context.clients)):
        values = {name: named[name].data for name in names}
        states.append(make_client_slot(values, spec.train, config, mpu=ClientMpu(groups), groups=groups))
    for name, tensor in states[0].tensors().items():
        named[name].data = tensor
    budget = ActivationBudget(engine.activation_gib, context.sharers)
    executor = LayerMajorExecutor(
        net,
        parts,
        store,
        budget,
        inputs=engine.block_inputs,
        compiled=engine.compile_blocks,
        logits_mib=engine.logits_mib,
    )
    return StreamedEngine(net, states, groups, store=store, executor=executor, clock=context.clock)
