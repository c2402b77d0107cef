"""The planner's task, from a run's configuration and its hosts. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedspeed.cluster.topology import Topology, warnings
from fedspeed.config.deepspeed import zero_stage
from fedspeed.config.deepspeed_rules import at
from fedspeed.config.rules.engine import MATMUL_TYPES
from fedspeed.config.run import RunConfig
from fedspeed.errors import PlanError
from fedspeed.federation.methods.config import METHODS
from fedspeed.models.families.registry import FAMILIES
from fedspeed.models.families.shape import ModelShape
from fedspeed.planner.hardware import PEAK_SHARE, Device, Node, common_type
from fedspeed.planner.plan import Task
from fedspeed.planner.timing import matrix_rate

MAX_ROWS = 4096


def task_of(
    config: RunConfig,
    ds_config: dict[str, Any],
    shape: ModelShape,
    devices: Sequence[Device],
    *,
    rows: int | None = None,
    micro_batch: int | None = None,
    quantised: bool = False,
) -> Task:
    """Return the task that a configuration describes.

    Args:
        ds_config: its merged DeepSpeed section.
        devices: those that train; they decide about the numeric type if model.dtype is auto.
        rows: sequences of a step on each rank, instead of train.micro_batch * train.accumulation.
        micro_batch: a fixed size; None: the plan chooses how to divide the rows.
        quantised: whether a base in 8 or 4 bits may be proposed.

    Raises:
        PlanError: a device does not support the numeric type or engine.matmul, or the planner does not model
            the task.
        ModelError: the adapter does not fit the model.
    """
    rows = rows or config.train.micro_batch * config.train.accumulation
    _check_supported(config, shape)
    _check_rows(rows, micro_batch)
    task = Task(
        shape,
        config.data.clients,
        config.data.max_tokens,
        rows=rows,
        micro_batch=micro_batch,
        dtype=common_type(devices, config.model.dtype),
        method=config.adapter.method,
        lora_rank=config.adapter.lora_rank,
        targets=config.adapter.targets,
        dropout=config.adapter.dropout,
        optimizer=config.train.optimizer,
        local_steps=config.train.local_steps,
        stage=zero_stage(ds_config),
        offload=at(ds_config, "zero_optimization.offload_param.device") == "cpu"
        or config.engine.base_reads == "one_sided",
        quantised=quantised,
        cleared=_engine_overrides(config),
        staleness=config.federation.staleness,
        matmul=config.engine.matmul,
        logits_mib=config.engine.logits_mib,
        folded_rank=_folded_rank(config),
    )
    _ = task.trainable  # raises ModelError where the model lacks a target
    for device in devices:
        _check_arithmetic(task, device)
    return task


def _check_supported(config: RunConfig, shape: ModelShape) -> None:
    FAMILIES[shape.family].check_trained(config.adapter.method)
    if config.adapter.method == "blocks":
        raise PlanError(
            "adapter.method=blocks: the planner knows lora and full only; what chosen blocks need lies "
            "between the two"
        )
    if config.data.max_tokens > shape.positions > 0:
        raise PlanError(
            f"data.max_tokens={config.data.max_tokens}: {shape.name} has {shape.positions} positions; set "
            f"data.max_tokens={shape.positions}"
        )


def _check_rows(rows: int, micro_batch: int | None) -> None:
    if rows > MAX_ROWS:
        raise PlanError(f"{rows} rows in a step: the planner takes at most {MAX_ROWS}")
    if micro_batch and rows % micro_batch:
        fitting = max(m for m in range(1, min(micro_batch, rows) + 1) if rows % m == 0)
        raise PlanError(
            f"--micro-batch={micro_batch} does not divide the {rows} rows of a step; choose "
            f"--micro-batch={fitting}, or other --rows"
        )


def _folded_rank(config: RunConfig) -> int:
    """Return the largest rank that a method's folded adapter can reach: every round adds the factors of all
    participating clients. Return 0 for a method that folds nothing.

    What a client with a smaller LoRA rank folds is not counted: it takes less than the trained factors that
    it replaces, and these are counted with adapter.lora_rank for all.
    """
    if not METHODS[config.federation.method.name].folds:
        return 0
    return (
        config.federation.rounds
        * (config.federation.clients_per_round or config.data.clients)
        * config.adapter.lora_rank
    )


def _engine_overrides(config: RunConfig) -> tuple[str, ...]:
    """Return the overrides that a plan adds to its setting: those that reset engine keys which the plan does
    not use, and those that it relies on.
    """
    overrides = ["engine.base_gib=0"] if config.engine.base_gib else []
    overrides += ["engine.pipeline=none"] if config.engine.pipeline != "none" else []
    overrides += [f"engine.matmul={config.engine.matmul}"] if config.engine.matmul != "default" else []
    limit = config.engine.logits_mib
    overrides += [f"engine.logits_mib={limit}"] if limit != "auto" else []
    return tuple(overrides)


def _check_arithmetic(task: Task, device: Device) -> None:
    """Check that a run would accept engine.matmul on a device.

    Raises:
        PlanError: it would not.
    """
    wanted = MATMUL_TYPES.get(task.matmul)
    if wanted is None:
        return
    if device.kind != "gpu":
        raise PlanError(
            f"engine.matmul={task.matmul} is arithmetic of NVIDIA cards, and {device.name} is none; set "
            "engine.matmul=default"
        )
    if task.dtype != wanted:
        raise PlanError(
            f"engine.matmul={task.matmul} changes products of {wanted} numbers, but this run computes in "
            f"{task.dtype}; set engine.matmul=default, or model.dtype={wanted}"
        )
    matrix_rate(task, device)  # raises PlanError where the rate is unknown


def notes_of(topology: Topology, nodes: Mapping[str, Node]) -> list[str]:
    """Return notes about assumed facts of the training hosts, the source of speeds, and idle hosts."""
    assumed: dict[tuple[str, ...], list[str]] = {}
    for name, node in nodes.items():
        if node.assumed:
            assumed.setdefault(node.assumed, []).append(name)
    notes = [
        f"{', '.join(hosts)}: {' and '.join(facts)} assumed; state them in the hostfile, or measure with "
        "`fedspeed probe`"
        for facts, hosts in assumed.items()
    ]
    sources = {node.device.name: node.device.source for node in nodes.values()}
    notes += [
        f"{name}: speeds {source}"
        + (f", {PEAK_SHARE:.0%} of the peak matrix rate" if source == "published" else "")
        for name, source in sources.items()
    ]
    return notes + list(warnings(topology))
