"""Building a rank's engine: meta model -> adapter -> tags -> weights block by block -> DeepSpeed."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from fedspeed.data.config import TrainConfig
from fedspeed.engine.attention import choose_attention
from fedspeed.engine.base.choose import choose_tier, for_stage, for_trainable, layout_of, pipeline_section, pipeline_tier
from fedspeed.engine.client_engine import ClientEngine
from fedspeed.engine.client_state import ClientState, flattened
from fedspeed.engine.config import EngineConfig
from fedspeed.engine.ds_config import finish, model_facts
from fedspeed.engine.groups import ClientMpu, StageMpu, alone, make_groups
from fedspeed.engine.masters import Place, parameters_of, whole_places
from fedspeed.engine.operators import build_operators
from fedspeed.errors import FedSpeedError
from fedspeed.models.blocks import anatomy, trained_outside
from fedspeed.models.config import AdapterConfig, ModelConfig
from fedspeed.models.factors import is_factor_a
from fedspeed.models.loading import materialise, meta_model
from fedspeed.schedule.layout import Layout


def build_engine(model: ModelConfig, adapter: AdapterConfig, train: TrainConfig, engine: EngineConfig, ds_config: dict,
                 client_sets: list[tuple[int, ...]], clock, nvme: Path, seed: int, clients: int = 1, sharers: int = 1) -> ClientEngine:
    """Build the engine of this rank. Collective over the cluster's torch world, which must have been joined.

    Args:
        ds_config: plain DeepSpeed configuration; `auto` is still allowed where only the model knows.
        client_sets: cluster ranks of the clients, the same list on every rank of the cluster.
        clock: what `gather` and `compute` seconds are accounted to (monitor.clock.StageClock).
        nvme: folder of this rank alone for offloaded tensors.
        clients: how many clients this rank carries. sharers: ranks that compute on this rank's device, or on its host where that is the device.

    Raises:
        ModelError: the model folder, its weights or the adapter do not fit.
        FedSpeedError: the tier has no room for the base.
    """
    groups = make_groups(client_sets)
    net = meta_model(model, adapter)
    choose_attention(net)
    if engine.pipeline != "none":
        return _pipelined(net, model, adapter, train, engine, ds_config, client_sets, groups, clock, nvme, seed, clients)
    tier = choose_tier(engine, ds_config, any(not p.requires_grad for p in net.parameters()), trained_outside(net))
    if tier == "stock":
        return _stock(net, model, adapter, train, engine, ds_config, groups, clock, nvme, seed)
    return _streamed(net, model, adapter, train, engine, tier, ds_config, groups, clock, nvme, seed, clients, sharers)


def _stock(net, model, adapter, train, engine, ds_config, groups, clock, nvme, seed) -> ClientEngine:
    """DeepSpeed holds and executes the model."""
    from fedspeed.engine.stock import StockEngine

    mpu = ClientMpu(groups)
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    config = finish(ds_config, model_facts(net), nvme, stage == 3 and engine.base_partition == "cluster" and groups.cluster_size > 1)
    build_operators("stock", config)  # before any part of DeepSpeed does it without a word
    if stage == 3:
        from fedspeed.engine.partition import TaggedInit

        place = TaggedInit(groups, config, mpu, engine.base_partition, clock).place
    else:
        place = _on_device
    materialise(net, model, adapter, seed, place)
    _buffers_on_device(net)
    if engine.activation_checkpointing:
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if adapter.method == "lora":
            net.enable_input_require_grads()
    mixed = {str(p.dtype) for p in net.parameters()}
    assert len(mixed) == 1, f"parameters of several types ({', '.join(sorted(mixed))}): DeepSpeed would keep no masters for some"
    ds_engine = _initialise(net, whole_places({n: p for n, p in sorted(net.named_parameters()) if p.requires_grad}), train, config, mpu)
    if stage == 3:
        # A parameter that escaped tagging would be trained jointly by all clients of the cluster, without an error.
        loose = [n for n, p in net.named_parameters() if p.requires_grad and p.ds_zero_partition_world_size != groups.client_size]
        assert not loose, f"trainable parameters partitioned beyond their client: {loose}"
    matched = None if stage != 3 else groups.cluster if engine.base_partition == "cluster" else groups.client
    return StockEngine(ds_engine, groups, matched, clock)


def _streamed(net, model, adapter, train, engine, tier, ds_config, groups, clock, nvme, seed, clients, sharers) -> ClientEngine:
    """The base in a store, executed layer by layer; DeepSpeed holds what trains."""
    from fedspeed.engine.activations import ActivationBudget
    from fedspeed.engine.base.build import StoreBuilder
    from fedspeed.engine.layer_major import LayerMajor
    from fedspeed.engine.streamed import StreamedEngine

    parts = anatomy(net)
    builder = StoreBuilder(net, parts, tier, engine, groups, ds_config, nvme)
    names = [n for n, p in sorted(net.named_parameters()) if p.requires_grad]
    materialise(net, model, adapter, seed, builder.place)
    _buffers_on_device(net)
    store = builder.seal(clock)
    named = dict(net.named_parameters())  # the net's own trainable tensors are places that the seats' are bound to
    config = finish(for_trainable(ds_config), model_facts(net), nvme, shared_base=False)
    states = []
    for _ in range(min(clients, engine.seats or clients)):
        states.append(_client_slot({name: named[name].data for name in names}, train, config, ClientMpu(groups), groups))
    for name, tensor in states[0].tensors().items():
        named[name].data = tensor
    layers = LayerMajor(net, parts, store, ActivationBudget(engine.activation_gib, sharers), inputs=engine.block_inputs,
                        compiled=engine.compile_blocks)
    return StreamedEngine(net, states, groups, store, layers, clock)


def _pipelined(net, model, adapter, train, engine, ds_config, client_sets, groups, clock, nvme, seed, clients) -> ClientEngine:
    """A part of the model on each rank of the torch world; nothing is read of the others' parts."""
    from deepspeed import comm as dist

    from fedspeed.engine.base.build import StoreBuilder
    from fedspeed.engine.pipeline.engine import FederatedPipelineEngine, FederatedPipelineModule
    from fedspeed.engine.pipeline.pipelined import ClientPipeline, ClusterPipeline
    from fedspeed.engine.pipeline.stage import Stage

    me, ranks, parts, cluster_wide = dist.get_rank(), dist.get_world_size(), anatomy(net), engine.pipeline == "cluster"
    owners, mine = _seats(client_sets, me, min(clients, engine.seats or clients))
    tier = pipeline_tier(engine, ds_config, trained_outside(net))
    layout, loads = _agreed(layout_of(engine, tier, len(parts.blocks), ranks)), tier != "resident"
    held = [parts.blocks[b] for b in layout.blocks_of(me)]
    ends = {parts.embedding: me in owners if cluster_wide else me == 0, parts.head: me in owners if cluster_wide else me == layout.holders[-1]}
    inside = {p for module in (*parts.blocks, *ends) for p in module.parameters()}
    only = {p for p in net.parameters() if p not in inside} | {p for module in [*held, *(m for m, here in ends.items() if here)] for p in module.parameters()}
    builder = StoreBuilder(net, parts, tier, engine, alone(groups), ds_config, nvme, only)
    place_of = {p: b for b, block in enumerate(parts.blocks) for p in block.parameters()}
    stages = [[n for n, p in sorted(net.named_parameters()) if p.requires_grad and place_of[p] in layout.blocks_of(rank)] for rank in range(ranks)]
    if idle := [rank for rank, names in enumerate(stages) if not names]:
        raise FedSpeedError(f"engine.pipeline={engine.pipeline}: nothing trains in the blocks of stage {idle[0]}; choose adapter.targets in every block, or "
                            "other engine.cuts")
    names = stages[me]
    materialise(net, model, adapter, seed, builder.place, only)
    _buffers_on_device(net)
    store = builder.seal(clock)
    pipe = FederatedPipelineEngine(FederatedPipelineModule(parts.blocks, layout.chunks, layout.holders, ranks), pipeline_section(ds_config))
    named = dict(net.named_parameters())
    config = finish(for_stage(ds_config), model_facts(net), nvme, shared_base=False)
    states = []
    for _ in owners if cluster_wide else mine:
        mpu = StageMpu(alone(groups), groups.cluster, ranks)
        states.append(_client_slot({name: named[name].data for name in names}, train, config, mpu, alone(groups)))
    stage = Stage(net, parts, store, layout.chunks, loads or engine.activation_checkpointing)
    if cluster_wide:
        return ClusterPipeline(net, states, groups, store, pipe, stage, layout, clock, owners, mine, stages)
    return ClientPipeline(net, states, groups, store, pipe, stage, layout, loads, clock)


def _agreed(layout: Layout) -> Layout:
    """The first rank's: each may know other measurements of the machines (cluster.probe). Collective over the torch world."""
    from deepspeed import comm as dist
    from deepspeed.accelerator import get_accelerator

    words = torch.tensor([(chunk.start, chunk.stop, holder) for chunk, holder in zip(layout.chunks, layout.holders)],
                         device=get_accelerator().current_device_name())
    dist.broadcast(words, 0)
    chunks = words.tolist()
    return Layout(tuple(range(start, stop) for start, stop, _ in chunks), tuple(holder for *_, holder in chunks))


def _seats(client_sets: list[tuple[int, ...]], me: int, own: int) -> tuple[list[int], list[int]]:
    """(of all seats of the cluster, the first rank of those that carry its client; the seats of this rank's clients). Collective over the cluster.

    Args:
        own: how many this rank has.
    """
    from deepspeed import comm as dist
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator().current_device_name()
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, torch.tensor([own], device=device))
    owners, mine = [], []
    for ranks in client_sets:
        if me in ranks:
            mine = list(range(len(owners), len(owners) + own))
        owners += [ranks[0]] * int(counts[ranks[0]])
    return owners, mine


def _client_slot(named: dict[str, torch.Tensor], train: TrainConfig, config: dict, mpu, groups) -> ClientState:
    """A DeepSpeed engine over copies of what trains: LoRA's factors A in one flat parameter, all others in a second one."""
    found: dict[str, Place] = {}
    for part in _by_factor(named):
        found |= flattened({name: named[name] for name in part})
    places = {name: found[name] for name in named}
    own = nn.ParameterList(parameters_of(places.values()))
    return ClientState(_initialise(own, places, train, config, mpu), places, groups)


def _by_factor(names: Iterable[str]) -> list[list[str]]:
    """LoRA's factors A, and all other tensors; a part that is empty is left out."""
    factors, others = [], []
    for name in names:
        (factors if is_factor_a(name) else others).append(name)
    return [part for part in (factors, others) if part]


def _initialise(module: nn.Module, places: dict[str, Place], train: TrainConfig, config: dict, mpu):
    import deepspeed

    ds_engine, *_ = deepspeed.initialize(model=module, optimizer=make_optimizer(places, train), config=config, mpu=mpu, dist_init_required=False,
                                         model_parameters=parameters_of(places.values()))
    return ds_engine


def _on_device(name: str, parameter: nn.Parameter) -> nn.Parameter:
    from deepspeed.accelerator import get_accelerator

    parameter.data = parameter.data.to(get_accelerator().current_device_name())
    return parameter


def _buffers_on_device(net: nn.Module) -> None:
    """Buffers are small, whatever streams."""
    from deepspeed.accelerator import get_accelerator

    for module in net.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(get_accelerator().current_device_name()))


def make_optimizer(places: dict[str, Place], train: TrainConfig) -> torch.optim.Optimizer:
    """The local optimizer; LoRA's A and B are groups of their own, so that one of them can be held still."""
    groups = [{"params": parameters_of(places[name] for name in part), "names": frozenset(part)} for part in _by_factor(places)]
    # The rate is set before each step. Until then it is 0: DeepSpeed takes a step without gradients to make the states, which would decay.
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=train.momentum, weight_decay=train.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=(train.beta1, train.beta2), eps=train.eps, weight_decay=train.weight_decay)
