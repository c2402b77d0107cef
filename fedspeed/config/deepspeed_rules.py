"""Rules about the DeepSpeed configuration of a federated run. Pure functions over plain dicts.

`clashes` applies to any part of a configuration, so that a section can be checked before its base file is
read; `incoherences` needs the whole configuration.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fedspeed.config.deepspeed_schema import (
    AUTO,
    ENGINE_AUTOS,
    FORCED,
    HARMLESS_AUTOS,
    REFUSED,
    REFUSED_OFF,
    REMOVED,
    SCHEMA,
)
from fedspeed.config.names import remedy_for_unknown
from fedspeed.config.run import RunConfig


@dataclass(frozen=True)
class Finding:
    """A fault of a DeepSpeed configuration.

    Attributes:
        key: dotted, as in `zero_optimization.stage`.
        text: the message; it begins with the key.
        run_keys: keys of the run's own sections that the value contradicts.
    """

    key: str
    text: str
    run_keys: tuple[str, ...] = ()


_INTERVAL = "pipeline.activation_checkpoint_interval"


def run_values(config: RunConfig) -> dict[str, tuple[Any, str]]:
    """Return DeepSpeed key -> (value that the run gives it, the run's own key)."""
    values = {
        "train_micro_batch_size_per_gpu": (config.train.micro_batch, "train.micro_batch"),
        "gradient_accumulation_steps": (config.train.accumulation, "train.accumulation"),
        "gradient_clipping": (config.train.clip, "train.clip"),
        "fp16.enabled": (_enabled("fp16", config), "model.dtype"),
        "bf16.enabled": (_enabled("bf16", config), "model.dtype"),
    }
    if config.engine.pipeline != "none":
        values[_INTERVAL] = (int(config.engine.activation_checkpointing), "engine.activation_checkpointing")
    return values


def _enabled(dtype: str, config: RunConfig) -> bool | str:
    """Return whether a run computes in this 16-bit type; `auto` until that is decided."""
    return AUTO if config.model.dtype == "auto" else config.model.dtype == dtype


def clashes(section: dict[str, Any], config: RunConfig) -> list[Finding]:
    """Return unknown keys, values of the wrong type, and values that contradict the run's own sections."""
    misshapen = [finding for key, value in section.items() for finding in _shape(key, value, SCHEMA)]
    known = {finding.key for finding in misshapen}
    judged = [
        *_refused(section),
        *_pipeline(section, config),
        *_contradictions(section, config),
        *_optimizer(section, config),
    ]
    return misshapen + [finding for finding in judged if finding.key not in known]


def incoherences(merged: dict[str, Any], config: RunConfig) -> list[Finding]:
    """Return contradictions inside a merged configuration, and values `auto` that nothing replaces."""
    return [*_undecided(merged, config), *_stage_and_offload(merged), *_checkpointing(merged, config)]


def at(block: Any, key: str) -> Any:
    """Return the value of a dotted key; None if it is absent."""
    for name in key.split("."):
        block = block.get(name) if isinstance(block, dict) else None
    return block


def leaves(block: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every leaf of nested dicts; an empty dict is a leaf."""
    for name, value in block.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shape(key: str, value: Any, known: dict[str, Any], prefix: str = "") -> Iterator[Finding]:
    full = prefix + key
    if full in REMOVED:
        yield Finding(full, f"{full} was removed from DeepSpeed before 0.19.8; {REMOVED[full]}")
    elif key not in known:
        yield Finding(
            full,
            f"{full} is not a key of DeepSpeed 0.19.8; "
            f"{remedy_for_unknown(full, [prefix + name for name in known])}",
        )
    elif isinstance(known[key], dict):
        if isinstance(value, dict):
            for name, inner in value.items():
                yield from _shape(name, inner, known[key], full + ".")
        elif value is not None:
            yield Finding(full, f"{full} is {json.dumps(value)}, but it is a block; write its keys below it")
    elif value not in (None, AUTO) and not _fits(value, known[key]):
        yield Finding(full, f"{full} is {json.dumps(value)}, but must be {_TYPE_NAMES[known[key]]}")


def _fits(value: Any, type_: Any) -> bool:
    if isinstance(value, bool) and type_ in (int, float):
        return False
    if type_ is int:
        # DeepSpeed takes 2e6 for a size.
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if type_ is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, type_)


_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a block",
    (str, list): "auto or a list",
    (str, int): "auto or a whole number",
    (dict, bool): "a block",
}


def _refused(section: dict[str, Any]) -> Iterator[Finding]:
    for key, remedy in REFUSED.items():
        value = at(section, key)
        if value not in (None, False, *REFUSED_OFF.get(key, ())):
            yield Finding(key, f"{key}{_is(value)} is not possible in a federated run; {remedy}")
    for key, forced in FORCED.items():
        if at(section, key) not in (None, AUTO, forced):
            yield Finding(
                key, f"{key} is {json.dumps(not forced)}, but FedSpeed runs torch's own optimizers; remove it"
            )
    if at(section, "gradient_allreduce_op") not in (None, AUTO, "mean"):
        yield Finding(
            "gradient_allreduce_op",
            f"gradient_allreduce_op{_is(section['gradient_allreduce_op'])} would scale a "
            "client's gradient with its number of ranks; remove it",
        )


def _is(value: Any) -> str:
    return "" if isinstance(value, (dict, list)) else f"={json.dumps(value)}"


def _pipeline(section: dict[str, Any], config: RunConfig) -> Iterator[Finding]:
    """Refuse a pipeline section that contradicts engine.*.

    Settings of tensor parallelism are accepted, because they have no effect.
    """
    block = section.get("pipeline")
    scope = config.engine.pipeline
    if not isinstance(block, dict) or not block:
        return
    if scope == "none":
        yield Finding(
            "pipeline",
            "pipeline is given, but engine.pipeline is none; set "
            "engine.pipeline=client (or cluster), or remove the block",
            ("engine.pipeline",),
        )
    if block.get("stages") not in (None, AUTO):
        yield Finding(
            "pipeline.stages",
            f"pipeline.stages{_is(block['stages'])}, but "
            f"engine.pipeline={scope} makes a stage of every rank; write auto",
        )
    if block.get("partition") not in (None, AUTO, "best"):
        yield Finding(
            "pipeline.partition",
            f"pipeline.partition{_is(block['partition'])}, but engine.cuts says where stages end; write best",
        )


def _contradictions(section: dict[str, Any], config: RunConfig) -> Iterator[Finding]:
    for key, (wanted, run_key) in run_values(config).items():
        value = at(section, key)
        if value not in (None, AUTO) and value != wanted:
            run_value = config.model.dtype if run_key == "model.dtype" else wanted
            cure = f"{run_key}={bool(value) if key == _INTERVAL else value}"
            if run_key == "model.dtype":
                cure = _dtype_cure(key, value)
            yield Finding(
                key,
                f"{key} is {json.dumps(value)}, but {run_key} is {run_value}; write auto for "
                f"it, or set {cure}",
                (run_key,),
            )


def _dtype_cure(key: str, value: Any) -> str:
    return f"model.dtype={key.partition('.')[0]}" if value else "another model.dtype, such as fp32"


def _optimizer(section: dict[str, Any], config: RunConfig) -> Iterator[Finding]:
    """Refuse an optimizer block that contradicts train.*, from which the engine builds the optimizer."""
    train = config.train
    block = section.get("optimizer")
    if not isinstance(block, dict):
        return
    remedy = "remove the optimizer block (train.* sets all of it), or set"
    type_ = block.get("type")
    if isinstance(type_, str) and type_ != AUTO and type_.lower() != train.optimizer:
        yield Finding(
            "optimizer.type",
            f"optimizer.type is {type_}, but train.optimizer is "
            f"{train.optimizer}; remove the optimizer block (train.* sets all of it), or choose "
            "train.optimizer=adamw or sgd",
            ("train.optimizer",),
        )
    expected: dict[str, tuple[Any, str]] = {
        "lr": (train.lr, "train.lr"),
        "weight_decay": (train.weight_decay, "train.weight_decay"),
    }
    if train.optimizer == "adamw":
        expected |= {
            "betas": ([train.beta1, train.beta2], "train.beta1 and train.beta2"),
            "eps": (train.eps, "train.eps"),
        }
    else:
        expected |= {"momentum": (train.momentum, "train.momentum")}
    params = block.get("params")
    for name, value in params.items() if isinstance(params, dict) else ():
        key = f"optimizer.params.{name}"
        if value in (None, AUTO, [AUTO, AUTO]) or (name, value) in _SAME_OPTIMIZER:
            continue
        if name not in expected:
            yield Finding(
                key, f"{key}{_is(value)} is not a setting of FedSpeed's {train.optimizer}; remove it"
            )
        elif value != expected[name][0]:
            wanted, run_key = expected[name]
            yield Finding(
                key,
                f"{key} is {json.dumps(value)}, but {run_key} "
                f"{'are' if ' and ' in run_key else 'is'} {json.dumps(wanted)}; {remedy} {run_key} "
                "to it",
                tuple(run_key.split(" and ")),
            )


# Settings of DeepSpeed's Adam that mean what torch.optim.AdamW does anyway.
_SAME_OPTIMIZER = (
    ("torch_adam", True),
    ("torch_adam", False),
    ("adam_w_mode", True),
    ("bias_correction", True),
)


def _undecided(merged: dict[str, Any], config: RunConfig) -> Iterator[Finding]:
    decided = {*ENGINE_AUTOS, *HARMLESS_AUTOS, *FORCED, *run_values(config)}
    decided |= {"pipeline.stages", "pipeline.partition", _INTERVAL}
    for key, value in leaves(merged):
        if value == AUTO and key not in decided and not key.startswith("optimizer."):
            yield Finding(
                key,
                f"{key} is auto, but FedSpeed does not choose it; write a value, or remove it for "
                "DeepSpeed's default",
            )


def _checkpointing(merged: dict[str, Any], config: RunConfig) -> Iterator[Finding]:
    key = "zero_optimization.offload_param.device"
    executed_by_deepspeed = config.engine.tier == "stock" or config.adapter.method == "full"
    if at(merged, key) == "nvme" and config.engine.activation_checkpointing and executed_by_deepspeed:
        yield Finding(
            key,
            f"{key}=nvme: DeepSpeed cannot recompute with parameters on NVMe (a buffer would "
            "be swapped in twice); set engine.activation_checkpointing=false, choose device cpu, "
            "or leave engine.tier=auto for a frozen base",
            ("engine.activation_checkpointing",),
        )


def _stage_and_offload(merged: dict[str, Any]) -> Iterator[Finding]:
    def zero(key: str) -> Any:
        return at(merged, f"zero_optimization.{key}")

    stage = zero("stage") or 0
    if stage == AUTO:
        return
    if stage not in (0, 1, 2, 3):
        yield Finding(
            "zero_optimization.stage",
            f"zero_optimization.stage is {json.dumps(stage)}; there are 0, 1, 2 and 3",
        )
        return
    least = {"offload_param": ("stage 3", 3), "offload_optimizer": ("stage 1 or higher", 1)}
    for block, (requirement, least_stage) in least.items():
        device = zero(f"{block}.device")
        key = f"zero_optimization.{block}"
        if device not in (None, "none", "cpu", "nvme"):
            yield Finding(
                f"{key}.device", f"{key}.device is {json.dumps(device)}; there are none, cpu and nvme"
            )
        elif device in ("cpu", "nvme") and stage < least_stage:
            yield Finding(
                f"{key}.device",
                f"{key}.device={device} needs {requirement}, but "
                f"zero_optimization.stage is {stage}; raise the stage, or choose device none",
            )
        elif device == "nvme" and stage < 3:
            yield Finding(
                f"{key}.device",
                f"{key}.device=nvme needs stage 3, at stage {stage} DeepSpeed "
                "would silently use the CPU; raise the stage, or choose device cpu",
            )
        if device == "nvme" and not zero(f"{block}.nvme_path"):
            yield Finding(
                f"{key}.nvme_path",
                f"{key}.nvme_path is missing; give a folder on the NVMe drive, or auto for the host's own",
            )
    if (ratio := zero("offload_optimizer.ratio")) is not None and ratio != 1 and stage < 3:
        key = "zero_optimization.offload_optimizer.ratio"
        yield Finding(
            key,
            f"{key}={ratio} needs stage 3, but zero_optimization.stage is {stage}; raise the "
            "stage, or remove it",
        )
