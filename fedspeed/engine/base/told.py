"""How a model is executed, in a line for the dry run and the report. Pure."""

from collections.abc import Mapping

from fedspeed.config.deepspeed import zero_stage
from fedspeed.config.run import RunConfig
from fedspeed.engine.base.choose import choose_tier, pipeline_tier

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


def execution(config: RunConfig, ds_config: Mapping, outside: str = "") -> str:
    """Which tier holds the base and what of the model is DeepSpeed's.

    Args:
        ds_config: the merged DeepSpeed section.
        outside: name of something that trains outside the decoder blocks, which only stock execution can do.
    """
    engine, stage = config.engine, zero_stage(dict(ds_config))
    if engine.pipeline != "none":
        place = _STAGE_PLACES[pipeline_tier(engine, dict(ds_config), outside)]
        return f"a pipeline over each {engine.pipeline}'s ranks, {place}"
    tier = choose_tier(engine, dict(ds_config), frozen=config.adapter.method != "full", outside=outside)
    if tier == "stock":
        return f"DeepSpeed ZeRO-{stage}"
    return (
        f"{_PLACES[tier]} (engine.tier={tier}), layer by layer; what trains by DeepSpeed ZeRO-{min(stage, 2)}"
    )
