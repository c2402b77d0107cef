"""All checks that need no rank and no weights: for `--dry-run`, and before any run starts.

Each package checks its own part (its `checks.py`); they are combined here. Only `look_inside` imports torch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedspeed.cluster.checks import check_layout
from fedspeed.cluster.hostfile import Hostfile
from fedspeed.cluster.topology import Topology, warnings
from fedspeed.config.check import notes, problems
from fedspeed.config.deepspeed import merge
from fedspeed.config.load import DEFAULT, Loaded
from fedspeed.config.run import RunConfig
from fedspeed.data.clients import ClientData, ClientRows, client_rows, encode_client, largest_id
from fedspeed.data.config import path_text
from fedspeed.data.prompt_template import template_for
from fedspeed.data.public import KEY, public_data
from fedspeed.data.row_counts import CLIENTS_NAMED, RowTable
from fedspeed.data.row_remarks import row_remarks
from fedspeed.engine.base.describe import execution
from fedspeed.engine.base.placement import choose_tier, pipeline_tier, slots_of
from fedspeed.engine.checks import check_engine, check_pipeline, engine_notes
from fedspeed.engine.operators import check_operators
from fedspeed.errors import ConfigError, FedSpeedError, Preempted
from fedspeed.federation.checks import check_method, check_weight, participants_of
from fedspeed.federation.pacing import round_text
from fedspeed.models.adapter_checks import adapter_notes, check_adapter
from fedspeed.models.base_files import base_shape
from fedspeed.models.checks import check_model, local_base
from fedspeed.models.positions import check_length
from fedspeed.models.saved_adapter import outside_blocks
from fedspeed.models.tokenizer import check_ids, load_tokenizer
from fedspeed.planner.plan import TYPE_BYTES
from fedspeed.routing.checks import check_routing
from fedspeed.routing.config import RoutingConfig
from fedspeed.routing.opening import resolve
from fedspeed.session.engine_spec import engine_spec
from fedspeed.session.eval_request import round_tasks
from fedspeed.session.forecast import rows_of
from fedspeed.session.needs import memory_lines, state_shapes, step_lines, traffic_lines
from fedspeed.session.planner_inputs import base_sizes, read_probe_file
from fedspeed.session.run_folder import check_run_folder
from fedspeed.units import shortened_list

BLOCKS_NAMED = 12


def check(loaded: Loaded, hostfile: Path | None) -> str:
    """Check a run and describe in a few lines what would run where.

    Raises:
        FedSpeedError: the first fault of each part, all in one message.
    """
    config = loaded.config
    lines = _all(
        (
            _place,
            check_model,
            check_adapter,
            _engine,
            _data,
            _evaluation,
            lambda loaded: _layout(loaded, hostfile),
        ),
        loaded,
    )
    how = execution(config, merge(config.deepspeed, config, loaded.folder), outside_blocks(config.adapter))
    lines.append(f"engine   {how}, {config.federation.rounds} rounds of {round_text(config).rstrip(',')}")
    remarks = [*loaded.preset_remarks, *notes(config), *engine_notes(loaded)]
    return "\n".join([*lines, *(f"note     {text}" for text in remarks)])


def look_inside(loaded: Loaded, hostfile: Path | None = None) -> str:
    """Check what needs the heavy libraries: the shapes of all weights, the tokenizer, all rows as tokens; and
    predict what the run will need.

    `check` must have passed.

    Returns:
        remarks about the rows, memory and traffic, in a few lines; may be empty.

    Raises:
        FedSpeedError: the first fault of each part, all in one message.
    """
    found = _Found()
    parts = (
        partial(_built, found=found),
        partial(_rows, found=found),
        partial(_public_rows, hostfile=hostfile),
    )
    lines = _all(parts, loaded)
    return "\n".join([*lines, *_needs(loaded, hostfile, found)])


@dataclass
class _Found:
    """What the checks with the heavy libraries have found.

    Attributes:
        shapes: of the trained arrays of the state, by name. server_only: names of those that only the
            method's server has.
        data: encoded rows by client.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    server_only: frozenset[str] = frozenset()
    data: list[ClientData] = field(default_factory=list)


def check_files(loaded: Loaded) -> None:
    """Check what one host may fail and another pass, except the data, which every rank reads anyway."""
    _all((_rules, _place, check_model, check_adapter, _engine), loaded)


def start_notes(loaded: Loaded) -> list[str]:
    """Return remarks about the base, the adapter to start from, and settings without effect."""
    return [
        *loaded.preset_remarks,
        *check_length(loaded.config.model.base, loaded.config.data.max_tokens),
        *adapter_notes(loaded),
        *engine_notes(loaded),
    ]


def _all(parts: Iterable[Callable[[Loaded], Sequence[str]]], loaded: Loaded) -> list[str]:
    """Run all parts; return their lines, or raise one FedSpeedError with the fault of each."""
    lines: list[str] = []
    faults: list[str] = []
    for part in parts:
        try:
            lines += part(loaded)
        except Preempted:  # a signal
            raise
        except FedSpeedError as error:
            faults += [str(error)] if str(error) not in faults else []  # two parts may find the same fault
        except OSError as error:  # of a path that cannot be looked up, such as a name that is too long
            faults.append(f"{error.filename or 'a path'}: cannot be used ({error.strerror}); correct it")
    if faults:
        raise FedSpeedError("\n  ".join(faults))
    return lines


def _rules(loaded: Loaded) -> list[str]:
    """Check the rules again, now that model.dtype=auto is resolved."""
    if broken := problems(loaded.config):
        raise ConfigError(broken)
    return []


def _place(loaded: Loaded) -> list[str]:
    check_run_folder(loaded)
    return []


def _engine(loaded: Loaded) -> list[str]:
    check_engine(loaded)
    config = loaded.config
    if config.engine.base_gib and (base := local_base(config)):
        # For `auto` the smallest type: once it is resolved, all of this is checked again.
        type_bytes = TYPE_BYTES.get(config.model.dtype, min(TYPE_BYTES.values()))
        slots_of(config.engine, base_sizes(base_shape(base, config.model.init == "pretrained"), type_bytes))
    if config.cluster.probe:
        read_probe_file(Path(config.cluster.probe))
    return []


def _data(loaded: Loaded) -> list[str]:
    config = loaded.config
    rows = client_rows(config.data, config.run.seed)
    counts = ", ".join(f"{len(r.train)}+{len(r.val)}" for r in rows[:16]) + (
        ", ..." if len(rows) > 16 else ""
    )
    return [
        f"data     {config.data.task}: {len(rows)} clients, training + held-out rows {counts}",
        *(f"         client {of.client}: {of.source}" for of in rows[:CLIENTS_NAMED] if of.source),
        *_held_out_lines(loaded),
    ]


def _held_out_lines(loaded: Loaded) -> list[str]:
    """Say where held-out rows come from if they are in files, and which keys have no effect then."""
    data = loaded.config.data
    if not data.held_out:
        return []
    without = [key for key in ("data.val_fraction", "data.max_val_rows") if loaded.sources[key] != DEFAULT]
    note = f"note     {', '.join(without)}: no effect, because data.held_out names the held-out rows"
    return [
        f"         held out: the rows of data.held_out={path_text(data.held_out)}, each at one client",
        *([note] if without else []),
    ]


def _evaluation(loaded: Loaded) -> list[str]:
    """Describe the evaluation tasks of the rounds, whose data must be there; nothing where there are none."""
    config = loaded.config.evaluation
    counts = [f"{task.name} ({len(items)} items)" for task, items in round_tasks(loaded.config)]
    every = "every round" if config.every == 1 else f"every {config.every} rounds"
    return [f"tasks    {', '.join(counts)}, {every}"] if counts else []


def _layout(loaded: Loaded, hostfile: Path | None) -> list[str]:
    config = loaded.config
    topology, launch, crowded = check_layout(config, hostfile)
    deepspeed = merge(config.deepspeed, config, loaded.folder)
    routing, count = check_plan(config, deepspeed, topology, launch.hostfile)
    resolve(routing.transport, launch.kind, len(topology.participants))
    if routing.between_organisations:
        from fedspeed.routing.listen_address import (
            check_port,
        )  # needs the package cryptography, which a plain run does not

        check_port(routing)
    server = []
    if topology.server:
        host = topology.placement(topology.server[0]).host
        ranks = len(topology.server)
        server.append(f"server   {host}: {ranks} rank{'s' if ranks > 1 else ''}, no clients")
    return [
        *(
            f"cluster  {c.name}: {len(c.ranks)} ranks, clients {_ranges(c.clients)}"
            for c in topology.clusters
            if c.clients
        ),
        *server,
        f"routing  {routing.mode}, {count} participant{'s' if count > 1 else ''}",
        *(f"idle     {text}" for text in warnings(topology)),
        *(f"note     {text}" for text in crowded),
    ]


def check_plan(
    config: RunConfig, deepspeed: dict[str, Any], topology: Topology, hostfile: Hostfile | None
) -> tuple[RoutingConfig, int]:
    """Check routing, method and engine against the topology.

    Args:
        deepspeed: the merged section (config.deepspeed.merge).

    Returns:
        the routing with its mode resolved, and the number of participants of a sum.

    Raises:
        FedSpeedError: one of them cannot work with this topology.
    """
    routing, count = check_routing(config, topology)
    client = engine_spec(config, deepspeed, "client")
    server = engine_spec(config, deepspeed, "server").kind if config.has_server else None
    spoken = participants_of(config, topology, count)
    check_method(replace(config, routing=routing), spoken, client.kind, server, client=client)
    check_pipeline(config, deepspeed, routing, topology, hostfile)
    return routing, count


def _built(loaded: Loaded, found: _Found) -> list[str]:
    """Check the weights of each role's model; say which blocks a role has if not all."""
    lines = []
    if local_base(loaded.config) is not None:
        from fedspeed.models.blocks import keep_blocks, trained_outside
        from fedspeed.models.loading import check_weights, meta_model

        config = loaded.config
        deepspeed = merge(config.deepspeed, config, loaded.folder)
        for role in ("client", "server") if config.has_server else ("client",):
            spec = engine_spec(config, deepspeed, role)
            model = meta_model(spec.model, spec.adapter)
            check_weights(model, spec.model, spec.adapter)
            frozen = any(not p.requires_grad for p in model.parameters())
            outside = trained_outside(model)
            if spec.engine.pipeline == "none":
                check_operators(choose_tier(spec.engine, spec.deepspeed, frozen, outside), spec.deepspeed)
            else:
                pipeline_tier(spec.engine, spec.deepspeed, outside)
            if spec.blocks is not None:
                who = "a client has" if role == "client" else "the server has"
                of = f"{len(spec.blocks)} of the base's {model.config.num_hidden_layers} blocks"
                lines.append(f"blocks   {who} {of} ({shortened_list(spec.blocks, BLOCKS_NAMED)})")
                keep_blocks(model, spec.blocks)
            shapes = state_shapes(config, model, role)
            if role == "server":
                found.server_only = frozenset(shapes.keys() - found.shapes.keys())
            found.shapes |= shapes
    return lines


def _rows(loaded: Loaded, found: _Found) -> list[str]:
    config = loaded.config
    clients = client_rows(config.data, config.run.seed)
    remarks = [f"note     {text}" for text in row_remarks(config.data, clients)]
    return [*_encoded(loaded, clients, found), *remarks]


def _encoded(loaded: Loaded, clients: Sequence[ClientRows], found: _Found) -> list[str]:
    """Describe every client's rows as tokens; nothing where the tokenizer is not available here."""
    config = loaded.config
    base = local_base(loaded.config)
    if base is None and config.model.tokenizer == "auto":
        return []
    tokenizer = load_tokenizer(config.model)
    found.data = [encode_client(rows, tokenizer, config.data) for rows in clients]
    if base is not None:
        check_ids(max(map(largest_id, found.data), default=0), config.model)
    weights = [data.weight for data in found.data]
    # A site is one participant, with all its clients; in a job each participant has at least one.
    check_weight(config, sum(weights) if config.routing.between_organisations else max(weights, default=0.0))
    table = RowTable.of([data.counts for data in found.data], config.data.max_tokens)
    return [
        f"rows     {table.line()}",
        *(f"         {line}" for line in table.client_lines()),
        *(f"note     {text}" for text in table.warnings()),
        *(f"note     {text}" for text in template_for(config.data, tokenizer).notes),
    ]


def _public_rows(loaded: Loaded, hostfile: Path | None) -> list[str]:
    """Describe the rows that the method's server trains on. With a hostfile, its host has the file, which may
    be another one.
    """
    config = loaded.config
    text = config.federation.public_rows
    if not text or (config.model.tokenizer == "auto" and local_base(config) is None):
        return []
    if hostfile is not None and not Path(text).exists():
        return [f"public   {KEY}={text} is not on this host; it is read on the server's"]
    public = public_data(text, config.data, load_tokenizer(config.model))
    if local_base(config) is not None:
        check_ids(largest_id(public), config.model)
    return [f"public   the server trains on {RowTable.of([public.counts], config.data.max_tokens).line()}"]


def _needs(loaded: Loaded, hostfile: Path | None, found: _Found) -> list[str]:
    """Predict memory and traffic; nothing where the model or the rows are not available here."""
    if not (found.shapes and any(data.train for data in found.data)):
        return []
    config = loaded.config
    topology, launch, _ = check_layout(config, hostfile)
    deepspeed = merge(config.deepspeed, config, loaded.folder)
    routing, _ = check_routing(config, topology)
    given = replace(config, routing=routing), deepspeed, topology, launch.hosts
    rows = rows_of(found.data)
    return [
        *step_lines(config, topology, found.data),
        *memory_lines(*given, rows=rows),
        *traffic_lines(*given, rows=rows, shapes=found.shapes, server_only=found.server_only),
    ]


def _ranges(numbers: tuple[int, ...]) -> str:
    """Return consecutive client numbers as a range."""
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
