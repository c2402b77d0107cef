"""What can be checked without starting a rank or reading a weight: for `--dry-run`, and before any run starts. `look_inside` alone imports
torch."""

import difflib
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fedspeed.cluster.cards import check_cards, dealt
from fedspeed.cluster.devices import computing_gpus
from fedspeed.cluster.discover import from_process
from fedspeed.cluster.hostfile import Hostfile
from fedspeed.cluster.local import check_rank_count, crowding, local_hosts
from fedspeed.cluster.topology import Topology, plan, warnings
from fedspeed.config.check import notes, problems
from fedspeed.config.deepspeed import merge
from fedspeed.config.load import DEFAULT, Loaded
from fedspeed.config.run import RunConfig
from fedspeed.data.config import steps_by_cluster
from fedspeed.engine.base.choose import BaseSizes, choose_tier, layout_of, pipeline_tier, slots_of
from fedspeed.engine.base.told import execution, unread
from fedspeed.engine.operators import check_operators
from fedspeed.errors import ConfigError, FedSpeedError, ModelError, PlanError, Preempted
from fedspeed.files import check_writable, json_value
from fedspeed.models import saved_adapter
from fedspeed.models.base_files import base_shape, check_base
from fedspeed.models.catalogue import ATTENTION_TARGETS, DEFAULT_ATTENTION_TARGETS, FAMILIES, ModelShape, shape_of
from fedspeed.models.factors import is_factor_a
from fedspeed.models.hub import check_hub
from fedspeed.models.json_object import read_object
from fedspeed.models.local_config import is_hub_name, local_folder
from fedspeed.models.planned import planned_shape
from fedspeed.models.positions import check_length
from fedspeed.models.saved_adapter import WEIGHTS_FILE, check_family, check_modules, ends_of, outside_blocks, read_config
from fedspeed.models.stored import check_types, stored_tensors
from fedspeed.planner.hardware import read_probe
from fedspeed.planner.memory import sizes
from fedspeed.planner.plan import TYPE_BYTES
from fedspeed.routing.config import RoutingConfig
from fedspeed.routing.opening import resolve
from fedspeed.schedule.limits import QUANTISED

if TYPE_CHECKING:
    from fedspeed.data.clients import ClientRows

QUICKSTART_BASE = "runs/quickstart-base"  # pretrained on the spot where it is missing
# What stands in a run's folder, should something else have its name.
RUN_FILES = ("report.md", "report.png", "comparison.png", "timeline.png", "summary.json", "rounds.jsonl", "roster-epoch")
RUN_FOLDERS = ("journal", "tensorboard", "trace", "adapter", "adapter-last", "model", "model-last")
# The names in a saved adapter for which adapter.targets=all-linear stands.
LINEAR = {"gpt2": {"c_attn", "c_proj", "c_fc"}}
DEFAULT_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def check(loaded: Loaded, hostfile: Path | None) -> str:
    """What would run where, in a few lines.

    Raises:
        FedSpeedError: the first fault of each part, all in one message.
    """
    config = loaded.config
    lines = _all((_place, _model, _adapter, _engine, _data, lambda loaded: _layout(loaded, hostfile)), loaded)
    how = execution(config, merge(config.deepspeed, config, loaded.folder), outside_blocks(config.adapter))
    lines.append(f"engine   {how}, {config.federation.rounds} rounds of {config.train.local_steps} local steps")
    return "\n".join([*lines, *(f"note     {text}" for text in [*notes(config), *engine_notes(loaded)])])


def engine_notes(loaded: Loaded) -> list[str]:
    """Which settings of the engine change nothing."""
    config = loaded.config
    return unread(config, merge(config.deepspeed, config, loaded.folder), outside_blocks(config.adapter))


def look_inside(loaded: Loaded) -> str:
    """What a rank would find out only with the heavy libraries at hand: the model without memory and its weights' shapes, the tokenizer, and
    every client's rows as tokens. `check` has passed.

    Returns:
        what is to be said about the rows, in a few lines; may be empty.

    Raises:
        FedSpeedError: the first fault of each part, all in one message.
    """
    return "\n".join(_all((_built, _rows), loaded))


def check_files(loaded: Loaded) -> None:
    """The part of `check` that one host may fail and another pass, but for the data, which a rank reads anyway."""
    _all((_rules, _place, _model, _adapter, _engine), loaded)


def check_clusters(config: RunConfig, topology: Topology) -> None:
    """What the configuration says about single clusters must be about clusters that are there."""
    names = [cluster.name for cluster in topology.clusters]
    for name in steps_by_cluster(config.train.local_steps_by_cluster):
        if name not in names:
            raise ConfigError(f"train.local_steps_by_cluster: no cluster {name} takes part; there {'are' if len(names) > 1 else 'is'} "
                              f"{', '.join(names)}")


def check_pipeline(config: RunConfig, ds_config: Mapping, routing: RoutingConfig, topology: Topology, hostfile: Hostfile | None) -> None:
    """A pipeline needs several ranks, no more than blocks, and cuts that fit; one over a cluster clients who trust each other, or none who hide anything.

    Args:
        routing: with its mode settled.
    """
    scope = config.engine.pipeline
    if scope == "client" and (short := [c.client for c in topology.clients if len(c.ranks) < 2]):
        raise ConfigError(f"engine.pipeline=client: client {short[0]} has one rank, and a pipeline needs two; set cluster.ranks_per_client=2 or more, with as "
                          "many ranks for each client (cluster.local_ranks, or the hostfile)")
    if scope == "cluster" and (short := [c.name for c in topology.clusters if len(c.ranks) < 2]):
        raise ConfigError(f"engine.pipeline=cluster: cluster {short[0]} has one rank, and a pipeline needs two; give it more, or set engine.pipeline=none")
    if scope != "none" and (tier := pipeline_tier(config.engine, ds_config, "")):
        for ranks in {len(place.ranks) for place in (topology.clients if scope == "client" else topology.clusters)}:
            layout_of(config.engine, tier, planned_shape(config.model.base).layers, ranks)
    if scope == "cluster" and routing.mode != "plain" and not config.cluster.one_trust_domain:
        if apart := [c.name for c in topology.clusters if hostfile is None or hostfile.cluster(c.name).trust != "shared"]:
            raise ConfigError("engine.pipeline=cluster shows every client's activations and adapter to the cluster's ranks, which "
                              f"routing.mode={routing.mode} is there to hide; if the clients of cluster {apart[0]} trust each other, set "
                              f"cluster.one_trust_domain=true (or `# fed-cluster {apart[0]} trust=shared` in the hostfile), else engine.pipeline=client")


def _all(parts, loaded: Loaded) -> list[str]:
    lines, faults = [], []
    for part in parts:
        try:
            lines += part(loaded)
        except Preempted:  # a signal, and no fault of this part
            raise
        except FedSpeedError as error:
            faults.append(str(error))
        except OSError as error:  # of a path that cannot even be asked for, such as one with a name that is too long
            faults.append(f"{error.filename or 'a path'}: cannot be used ({error.strerror}); correct it")
    if faults:
        raise FedSpeedError("\n  ".join(faults))
    return lines


def _rules(loaded: Loaded) -> list[str]:
    """What model.dtype=auto has come to may break a rule that the configuration as it was written keeps."""
    if broken := problems(loaded.config):
        raise ConfigError(broken)
    return []


def _place(loaded: Loaded) -> list[str]:
    out, run = Path(loaded.config.run.out), loaded.run_folder
    existing = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise FedSpeedError(f"run.out={out}: {existing} is not a folder; choose another place for the runs")
    if run.exists() and not run.is_dir():
        raise FedSpeedError(f"{run}: is a file, where the run's folder would be; move it away, or choose another run.name")
    try:
        check_writable(run)
    except OSError as error:
        raise FedSpeedError(f"run.out={out}: {run if run.is_dir() else existing} cannot be written to ({error.strerror}); mend its permissions, "
                            "or choose another place") from error
    for names, is_other, kinds in ((RUN_FILES, Path.is_dir, "a folder, where the run writes a file"),
                                   (RUN_FOLDERS, Path.is_file, "a file, where the run makes a folder")):
        if found := next((run / name for name in names if is_other(run / name)), None):
            raise FedSpeedError(f"{found}: is {kinds}; move it away, or choose another run.name")
    return []


def _model(loaded: Loaded) -> list[str]:
    lines, config = _base(loaded), loaded.config
    return lines + [f"note     {text}" for text in check_length(config.model.base, config.data.max_tokens)]


def _base(loaded: Loaded) -> list[str]:
    model = loaded.config.model
    if model.base == QUICKSTART_BASE and not Path(model.base).exists():
        return [f"model    {model.base}, pretrained on the spot when the run starts"]
    folder = local_base(loaded.config)
    if folder is None:
        if is_hub_name(model.base):
            check_hub(model.base, model.init == "pretrained")
            return [f"model    {model.base}, to be downloaded from the hub when the run starts"]
        raise ModelError(f"model.base: {model.base} does not exist{loaded.searched('model.base')}; "
                         "give a folder with config.json, or a hub name such as org/model")
    if Path(model.base).is_file() and Path(model.base).name != "config.json":
        raise ModelError(f"model.base: {model.base} is a file; give the folder it is in, or the config.json there")
    kind = _model_type(folder)
    if not isinstance(kind, str):
        raise ModelError(f"{folder / 'config.json'}: no model_type in it; give the config.json of a Hugging Face causal LM")
    if kind not in FAMILIES:
        raise ModelError(f"{folder / 'config.json'}: model_type {kind!r} is not supported; supported are {', '.join(FAMILIES)}")
    if model.init == "random":
        shape_of(str(folder))
        return [f"model    {folder} ({kind}, weights drawn from run.seed)"]
    _, stored, texts = check_base(folder)
    files = {tensor.file for tensor in stored.values()}
    return [f"model    {folder} ({kind}, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB in {len(files)} file(s))",
            *(f"note     {text}" for text in texts)]


def weight_notes(config: RunConfig) -> list[str]:
    """What is to be said about the files of a base that is there."""
    base = local_base(config)
    return check_base(base)[2] if base is not None and config.model.init == "pretrained" else []


def _model_type(folder: Path) -> object:
    return read_object(folder / "config.json", "a model configuration").get("model_type")


def local_base(config: RunConfig) -> Path | None:
    """The base's folder, None for a hub name that is not in the cache and for the quickstart's base before it is made."""
    return local_folder(config.model.base, config.model.init == "pretrained", config.model.tokenizer == "auto")


def _adapter(loaded: Loaded) -> list[str]:
    """The adapter a run starts from: its files are whole, one LoRA rank stands in all of them, and the configuration wants no other."""
    adapter = loaded.config.adapter
    if not adapter.start_from:
        _check_new_targets(loaded)
        return []
    folder = Path(adapter.start_from)
    if not folder.is_dir():
        raise ModelError(f"adapter.start_from: {folder} does not exist{loaded.searched('adapter.start_from')}; give a PEFT folder (adapter_config.json and "
                         "adapter_model.safetensors)")
    saved = read_config(folder)
    lora_rank, names = saved["r"], stored_tensors(folder, WEIGHTS_FILE)
    check_types(names.items())
    for name, stored in names.items():
        if is_factor_a(name) and stored.shape[0] != lora_rank:
            raise ModelError(f"{stored.file}: {name} has shape {stored.shape}, but adapter_config.json says r={lora_rank}; the two files "
                             "belong to different adapters, export it again")
    for key, ours, name in (("lora_rank", adapter.lora_rank, "r"), ("alpha", adapter.alpha, "lora_alpha")):
        source = loaded.sources[f"adapter.{key}"]
        if source != DEFAULT and ours != saved.get(name):
            raise ModelError(f"{source}: adapter.{key}={ours}, but adapter.start_from={folder} has {name}={saved.get(name)}; leave "
                             f"adapter.{key} out, or start from another adapter")
    if base := local_base(loaded.config):
        shape = shape_of(str(base))
        check_family(folder, saved, loaded.config.model.base, shape.family)
        check_modules(folder, saved, names, loaded.config.model.base, shape)
    _check_targets(loaded, saved.get("target_modules"))
    return [f"adapter  {folder} (r={lora_rank})", *(f"note     {text}" for text in adapter_notes(loaded))]


def adapter_notes(loaded: Loaded) -> list[str]:
    """What the adapter that a run starts from says of its base, where it sounds like another than the run's, and of a dropout that nobody
    has decided against."""
    adapter = loaded.config.adapter
    if not adapter.start_from:
        return []
    folder = Path(adapter.start_from)
    saved = read_config(folder)
    told = saved_adapter.notes(folder, saved, loaded.config.model.base)
    if loaded.sources["adapter.dropout"] == DEFAULT:
        told += saved_adapter.dropout_notes(folder, saved, adapter.dropout)
    return told


def start_notes(loaded: Loaded) -> list[str]:
    """What a run's reader should know of the base and the adapter that it starts from, and of settings that change nothing."""
    return [*check_length(loaded.config.model.base, loaded.config.data.max_tokens), *adapter_notes(loaded), *engine_notes(loaded)]


def _check_new_targets(loaded: Loaded) -> None:
    """That a fresh adapter's targets are names that the base has, but for the path before them."""
    config, base = loaded.config, local_base(loaded.config)
    if base is None or config.adapter.method != "lora" or config.adapter.targets in ("attention", "all-linear"):
        return
    shape = shape_of(str(base))
    known = list(dict.fromkeys([*(linear.name for linear in shape.linears), *ends_of(shape.family)]))
    asked = [name.strip() for name in config.adapter.targets.split(",")]
    if unknown := [name for name in asked if name.rpartition(".")[2] not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise ModelError(f"{loaded.sources['adapter.targets']}: adapter.targets={config.adapter.targets}: {base} ({shape.family}) has no "
                         f"{', '.join(unknown)}{f' (did you mean {near[0]}?)' if near else ''}; it has {', '.join(known)}. Or write attention or all-linear")


def _check_targets(loaded: Loaded, saved: object) -> None:
    """That the configuration, if it names targets, names those of the adapter it starts from. PEFT may save them with their place in the
    model, so the last words count."""
    adapter, source, base = loaded.config.adapter, loaded.sources["adapter.targets"], local_base(loaded.config)
    if source == DEFAULT or not isinstance(saved, list) or base is None:
        return
    kind = _model_type(base)
    ours = {"attention": ATTENTION_TARGETS.get(kind, DEFAULT_ATTENTION_TARGETS), "all-linear": LINEAR.get(kind, DEFAULT_LINEAR)}.get(
        adapter.targets, [name.strip() for name in adapter.targets.split(",")])
    there = {str(name).rpartition(".")[2] for name in saved}
    if {name.rpartition(".")[2] for name in ours} != there:
        raise ModelError(f"{source}: adapter.targets={adapter.targets}, but adapter.start_from={adapter.start_from} is on "
                         f"{','.join(sorted(there))}; leave adapter.targets out, or start from another adapter")


def _engine(loaded: Loaded) -> list[str]:
    tier = loaded.config.engine.tier
    if tier in QUANTISED and find_spec("bitsandbytes") is None:
        raise FedSpeedError(f"engine.tier={tier} needs bitsandbytes: pip install -r requirements-quantised.txt, or choose another tier")
    engine = loaded.config.engine
    if engine.base_gib and (base := local_base(loaded.config)):
        # Of `auto` the least it may come to: where the type is decided, all of this is checked again.
        type_bytes = TYPE_BYTES.get(loaded.config.model.dtype, min(TYPE_BYTES.values()))
        slots_of(engine, base_sizes(base_shape(base, loaded.config.model.init == "pretrained"), type_bytes))
    if engine.pipeline == "none":  # what trains outside the blocks, and so in stock execution, is known to look_inside only
        ds_config = merge(loaded.config.deepspeed, loaded.config, loaded.folder)
        check_operators(choose_tier(engine, ds_config, loaded.config.adapter.method != "full"), ds_config)
    if probe := loaded.config.cluster.probe:
        read_probe_file(Path(probe))
    return []


def base_sizes(shape: ModelShape, type_bytes: int, holders: int = 0) -> BaseSizes:
    """What `engine.base_gib` is held against, known before there is a model. holders: as in BaseSizes."""
    unit = sizes(shape, type_bytes)
    return BaseSizes(unit.block, shape.layers, unit.ends, max(unit.embedding, unit.head), unit.beside, holders)


def read_probe_file(path: Path) -> Mapping:
    """What `fedspeed probe` wrote.

    Raises:
        PlanError: it cannot be read, or is something else.
    """
    try:
        return read_probe(json_value(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError) as error:
        raise PlanError(f"{path}: cannot be read as a probe's file ({error}); write it with `fedspeed probe --out FILE`") from error


def _data(loaded: Loaded) -> list[str]:
    from fedspeed.data.clients import client_rows

    config = loaded.config
    rows = client_rows(config.data, config.run.seed)
    counts = ", ".join(f"{len(r.train)}+{len(r.val)}" for r in rows[:16]) + (", ..." if len(rows) > 16 else "")
    return [f"data     {config.data.task}: {len(rows)} clients, training + held-out rows {counts}"]


def _layout(loaded: Loaded, hostfile: Path | None) -> list[str]:
    config, launch = loaded.config, from_process(hostfile)
    hosts = local_hosts(launch, config.cluster.local_ranks, config.data.clients) if launch.kind == "none" else launch.hosts
    ranks, crowded = sum(host.slots for host in hosts), []
    if launch.kind == "none":
        if launch.hostfile:
            check_rank_count(ranks, launch.hostfile.path)
        if config.routing.started_by_mpi and ranks > 1:
            raise ConfigError(f"routing.transport={config.routing.transport}: plain python starts its ranks without MPI; "
                              "start with `mpirun -n N python launch.py ...`, or set routing.transport=gloo")
    topology = plan(hosts, config.data.clients, config.cluster.ranks_per_client)
    check_clusters(config, topology)
    if launch.kind == "none":
        crowded = _crowded(config, topology)
    routing, count = check_routing(config, topology)
    resolve(routing.transport, launch.kind, len(topology.participants))
    if routing.between_organisations:
        from fedspeed.routing.listening import check_port

        check_port(routing)
    check_pipeline(config, merge(config.deepspeed, config, loaded.folder), routing, topology, launch.hostfile)
    return [*(f"cluster  {c.name}: {len(c.ranks)} ranks, clients {_ranges(c.clients)}" for c in topology.clusters),
            f"routing  {routing.mode}, {count} participant{'s' if count > 1 else ''}", *_idle(topology), *(f"note     {text}" for text in crowded)]


def _crowded(config: RunConfig, topology: Topology) -> list[str]:
    """Notes on ranks of this machine that are to share a core or a GPU.

    Raises:
        ConfigError: two ranks of one torch world would share a GPU.
    """
    ranks, gpus = len(topology.ranks), computing_gpus(os.environ)
    if not gpus:
        return crowding(ranks)
    return check_cards(topology.worlds(config.engine.pipeline), dealt(ranks, gpus, socket.gethostname()))


def check_routing(config: RunConfig, topology: Topology) -> tuple[RoutingConfig, int]:
    """(the routing with its mode settled, participants of a sum).

    Raises:
        ConfigError: too few participants, what the settled mode forbids, or a package that it lacks.
            FedSpeedError: a site's files are wrong.
    """
    routing, count = config.routing, len(topology.participants)
    if routing.between_organisations:
        if count != 1:
            raise ConfigError(f"routing.transport={routing.transport}: a site is one participant, but its "
                              f"{len(topology.ranks)} ranks carry clients of {count}; set data.clients=1, or "
                              "cluster.local_ranks=1")
        from fedspeed.routing.identity import membership

        count = len(membership(routing)[1].members)
    routing = routing.settled(count)
    if broken := problems(replace(config, routing=routing)):
        raise ConfigError("; ".join(broken))
    if routing.mode != "plain" and find_spec("cryptography") is None:
        raise ConfigError(f"routing.mode={routing.mode} needs the package cryptography, which is not "
                          f"installed for {sys.executable}: pip install "
                          "cryptography, or set routing.mode=plain inside one trust domain")
    if routing.mode != "plain" and count < routing.min_participants:
        raise ConfigError(f"routing.mode={routing.mode} with {count} participant{'s' if count > 1 else ''}: a sum of fewer than "
                          f"{routing.min_participants} says too much about each; set routing.mode=plain inside one trust domain, or more ranks "
                          "(cluster.local_ranks, or the hostfile)")
    return routing, count


def routing_notes(asked: RoutingConfig, participants: int) -> list[str]:
    """What `routing.mode=auto` has come to, where it is not what its name is known for."""
    if asked.mode != "auto" or asked.settled(participants).mode != "plain" or participants < 2:
        return []
    return [f"routing.mode=plain for {participants} participants: a masked sum of fewer than {asked.min_participants} would say too much about each, so that "
            "updates travel in the clear inside this job"]


def _built(loaded: Loaded) -> list[str]:
    if local_base(loaded.config) is not None:
        from fedspeed.models.blocks import trained_outside
        from fedspeed.models.loading import check_weights, meta_model

        config = loaded.config
        model = meta_model(config.model, config.adapter)
        check_weights(model, config.model, config.adapter)
        frozen = any(not p.requires_grad for p in model.parameters())
        ds_config, outside = merge(config.deepspeed, config, loaded.folder), trained_outside(model)
        if config.engine.pipeline == "none":
            check_operators(choose_tier(config.engine, ds_config, frozen, outside), ds_config)
        else:
            pipeline_tier(config.engine, ds_config, outside)
    return []


def _rows(loaded: Loaded) -> list[str]:
    from fedspeed.data.clients import client_rows
    from fedspeed.data.findings import findings

    config = loaded.config
    clients = client_rows(config.data, config.run.seed)
    return [*_encoded(loaded, clients), *(f"note     {text}" for text in findings(config.data, clients))]


def _encoded(loaded: Loaded, clients: Sequence["ClientRows"]) -> list[str]:
    """What is left of every client's rows as tokens; nothing where the tokenizer is not to be had here."""
    from fedspeed.data.clients import encode_client, largest_id, row_counts
    from fedspeed.data.row_counts import RowTable
    from fedspeed.models.tokenizer import check_ids, load_tokenizer

    config, base = loaded.config, local_base(loaded.config)
    if base is None and config.model.tokenizer == "auto":
        return []
    tokenizer, largest, counts = load_tokenizer(config.model), 0, []
    for rows in clients:
        data = encode_client(rows, tokenizer, config.data)
        largest = max(largest, largest_id(data))
        counts.append(row_counts(data))
    if base is not None:
        check_ids(largest, config.model)
    table = RowTable.of(counts, config.data.max_tokens)
    return [f"rows     {table.line()}", *(f"         {line}" for line in table.client_lines()), *(f"note     {text}" for text in table.warnings())]


def _idle(topology: Topology) -> list[str]:
    return [f"idle     {text}" for text in warnings(topology)]


def _ranges(numbers: tuple[int, ...]) -> str:
    """Clients of a cluster are consecutive."""
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
