"""Build an engine that computes a part of a model: its two ends, or the blocks between them."""

from transformers import PreTrainedModel

from fedspeed.engine.base.placement import choose_tier, trainable_section
from fedspeed.engine.builders.common import make_client_slot, needed_parameters, put_buffers_on_device
from fedspeed.engine.builders.store import StoreBuilder
from fedspeed.engine.ds_config import model_facts, resolve_autos
from fedspeed.engine.groups import ClientMpu, Groups
from fedspeed.engine.spec import EngineContext, EngineSpec
from fedspeed.engine.split.body import BodyEngine
from fedspeed.engine.split.ends import EndsEngine
from fedspeed.engine.split.part import PartEngine
from fedspeed.errors import FedSpeedError
from fedspeed.models.blocks import anatomy, trained_outside
from fedspeed.models.loading import materialise


def build(net: PreTrainedModel, spec: EngineSpec, context: EngineContext, groups: Groups) -> PartEngine:
    """Build the engine from the kept blocks of a model on the meta device. Collective over the cluster.

    Raises:
        FedSpeedError: the tier is not `resident`, or something outside the blocks is trained.
    """
    is_body = spec.part == "body"
    parts = anatomy(net)
    tier = choose_tier(spec.engine, spec.deepspeed, frozen=True, outside=trained_outside(net))
    if tier != "resident":
        raise FedSpeedError(
            f"engine.tier={spec.engine.tier}: a part of a model is computed with resident weights only; set "
            "engine.tier=resident"
        )
    # A body has no use for embedding and head.
    only = needed_parameters(
        net, parts, range(len(parts.blocks)), {parts.embedding: not is_body, parts.head: not is_body}
    )
    builder = StoreBuilder(
        net, parts, tier, spec.engine, groups=groups, ds_config=spec.deepspeed, nvme=context.nvme, only=only
    )
    names = [n for n, p in sorted(net.named_parameters()) if p.requires_grad]
    materialise(net, spec.model, spec.adapter, context.seed, builder.place, only=only)
    put_buffers_on_device(net)
    store = builder.seal(context.clock)
    named = dict(net.named_parameters())
    config = resolve_autos(
        trainable_section(spec.deepspeed), model_facts(net), context.nvme, shared_base=False
    )
    states = [
        make_client_slot(
            {name: named[name].data for name in names},
            spec.train,
            config,
            mpu=ClientMpu(groups),
            groups=groups,
        )
        for _ in range(context.clients if is_body else 1)
    ]
    if is_body:
        return BodyEngine(
            net,
            states,
            groups,
            store=store,
            clock=context.clock,
            recompute=spec.engine.activation_checkpointing,
        )
    assert spec.blocks is not None, "both ends of a model are some of its blocks"
    first = next((at for at, number in enumerate(spec.blocks) if at != number), len(spec.blocks))
    return EndsEngine(net, states, groups, store=store, clock=context.clock, first=first)
