"""Build an engine whose model DeepSpeed holds and executes."""

from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from fedspeed.engine.builders.common import initialise, put_buffers_on_device, put_on_device
from fedspeed.engine.ds_config import model_facts, resolve_autos
from fedspeed.engine.groups import ClientMpu, Groups
from fedspeed.engine.masters import whole_parameters
from fedspeed.engine.operators import build_operators
from fedspeed.engine.partition import TaggedInit
from fedspeed.engine.spec import EngineContext, EngineSpec
from fedspeed.engine.stock import StockEngine
from fedspeed.models.loading import materialise


def build(net: PreTrainedModel, spec: EngineSpec, context: EngineContext, groups: Groups) -> StockEngine:
    """Build the engine from a model on the meta device. Collective over the cluster."""
    mpu = ClientMpu(groups)
    partition = spec.engine.base_partition
    stage = spec.deepspeed.get("zero_optimization", {}).get("stage", 0)
    shared_base = stage == 3 and partition == "cluster" and groups.cluster_size > 1
    config = resolve_autos(spec.deepspeed, model_facts(net), context.nvme, shared_base)
    build_operators("stock", config)  # else DeepSpeed would build them itself, without saying so
    place = put_on_device
    if stage == 3:
        place = TaggedInit(groups, config, mpu, partition, context.clock).place
    materialise(net, spec.model, spec.adapter, context.seed, place)
    put_buffers_on_device(net)
    if spec.engine.activation_checkpointing:
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # transformers lets the embedding's output require a gradient, for reentrant checkpoints. Without it
        # the backward pass ends at the lowest block that trains.
        net.disable_input_require_grads()
    mixed = sorted({str(p.dtype) for p in net.parameters()})
    assert len(mixed) == 1, (
        f"parameters of several types ({', '.join(mixed)}): DeepSpeed would keep no masters for some"
    )
    trained = {name: p for name, p in sorted(net.named_parameters()) if p.requires_grad}
    ds_engine = initialise(net, whole_parameters(trained), spec.train, config, mpu=mpu)
    if stage == 3:
        # All clients of the cluster would train a parameter without a tag together, without an error.
        loose = [
            n
            for n, p in net.named_parameters()
            if p.requires_grad and getattr(p, "ds_zero_partition_world_size") != groups.client_size
        ]
        assert not loose, f"trainable parameters partitioned beyond their client: {loose}"
    return StockEngine(ds_engine, groups, _matched_group(stage, partition, groups), context.clock)


def _matched_group(stage: int, partition: str, groups: Groups) -> ProcessGroup | None:
    """Return the group of the ranks that must make the same passes; None where every rank may go on alone."""
    if stage != 3:
        return None
    return groups.cluster if partition == "cluster" else groups.client
