"""Describe in a line how a model is executed, for the dry run and the report. Pure functions, without
torch.
"""

from collections.abc import Mapping

from fedspeed.config.deepspeed import zero_stage
from fedspeed.config.run import RunConfig
from fedspeed.engine.base.placement import choose_tier, pipeline_tier
from fedspeed.engine.config import EngineConfig

_DEFAULT = EngineConfig()

_PLACES = {
    "resident": "the base whole on every device",
    "int8": "the base whole on every device, in 8 bits",
    "nf4": "the base whole on every device, in 4 bits",
    "ram": "the base in host RAM, one copy a node",
    "nvme": "the base on NVMe, one copy a node",
    "client": "the base divided over each client's ranks",
    "cluster": "the base divided over each cluster's ranks",
}
_STAGE_PLACES = {
    "resident": "whose parts of the base stay on their devices",
    "ram": "whose parts of the base are loaded from their RAM",
    "nvme": "whose parts of the base are loaded from NVMe",
}

_LAYERS = {"client_slots", "block_inputs", "activation_gib", "compile_blocks"}
_SLOTS = {"block_slots", "base_gib", "resident_blocks"}
_READ = {  # by tier, which of _KEYS the execution reads
    "stock": {"activation_checkpointing"},
    "resident": _LAYERS,
    "int8": _LAYERS | {"block_slots", "resident_blocks"},
    "nf4": _LAYERS | {"block_slots", "resident_blocks"},
    "ram": _LAYERS | _SLOTS,
    "nvme": _LAYERS | _SLOTS,
    "client": _LAYERS | _SLOTS | {"base_reads"},
    "cluster": _LAYERS | _SLOTS | {"base_reads"},
}
_STAGE_READ = {
    "resident": {"client_slots", "activation_checkpointing"},
    "ram": {"client_slots"} | _SLOTS,
    "nvme": {"client_slots"} | _SLOTS,
}
_KEYS = (
    "client_slots",
    "block_slots",
    "base_gib",
    "resident_blocks",
    "base_reads",
    "block_inputs",
    "activation_gib",
    "compile_blocks",
    "activation_checkpointing",
)


def unused_settings(config: RunConfig, ds_config: Mapping, outside: str = "") -> list[str]:
    """Return a line for each engine setting that differs from its default and has no effect, because this
    execution does not read it. Arguments as in `execution`.
    """
    engine = config.engine
    if engine.pipeline != "none":
        read = _STAGE_READ[pipeline_tier(engine, dict(ds_config), outside)]
    else:
        read = _READ[
            choose_tier(engine, dict(ds_config), frozen=config.adapter.method != "full", outside=outside)
        ]
    if engine.base_gib and engine.pipeline == "none":
        read = read - {"block_slots"}  # base_gib decides how many slots there are
    unused = [key for key in _KEYS if getattr(engine, key) != getattr(_DEFAULT, key) and key not in read]
    how = execution(config, ds_config, outside)
    return [
        f"engine.{key}={_text(getattr(engine, key))} changes nothing in this run: {how}" for key in unused
    ]


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def execution(config: RunConfig, ds_config: Mapping, outside: str = "") -> str:
    """Say which tier stores the base and which ZeRO stage manages the trainable part.

    Args:
        ds_config: the merged DeepSpeed section.
        outside: name of a parameter that trains outside the decoder blocks; see `choose_tier`.
    """
    engine = config.engine
    stage = zero_stage(dict(ds_config))
    if engine.pipeline != "none":
        place = _STAGE_PLACES[pipeline_tier(engine, dict(ds_config), outside)]
        return f"a pipeline over each {engine.pipeline}'s ranks, {place}"
    tier = choose_tier(engine, dict(ds_config), frozen=config.adapter.method != "full", outside=outside)
    if tier == "stock":
        return f"DeepSpeed ZeRO-{stage}"
    base = f"{_PLACES[tier]} (engine.tier={tier}), layer by layer"
    return f"{base}; what trains by DeepSpeed ZeRO-{min(stage, 2)}"
