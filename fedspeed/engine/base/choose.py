"""Which tier a configuration means, and what is left of its DeepSpeed section for the part that trains.
Pure.
"""

import copy
from dataclasses import dataclass

from fedspeed.config.deepspeed import zero_stage
from fedspeed.config.deepspeed_rules import at
from fedspeed.config.spelling import flow
from fedspeed.engine.config import EngineConfig
from fedspeed.errors import FedSpeedError
from fedspeed.schedule.layout import Layout, interleaved, stages


def choose_tier(engine: EngineConfig, ds_config: dict, frozen: bool, outside: str = "") -> str:
    """A tier of `EngineConfig.tier` other than auto.

    Args:
        frozen: whether anything of the model is frozen; where all of it trains, there is no base to stream.
        outside: name of something that trains outside the decoder blocks, which only stock execution can do;
            empty where nothing does.

    Raises:
        FedSpeedError: the configuration asks for a tier that cannot train what it shall.
    """
    if not frozen:
        return "stock"
    if outside and engine.tier not in ("auto", "stock"):
        raise FedSpeedError(
            f"engine.tier={engine.tier} trains inside the decoder blocks only, and {outside} is outside "
            "them; choose other "
            "adapter.targets, or set engine.tier=stock"
        )
    if outside:
        return "stock"
    if engine.tier != "auto":
        return engine.tier
    if zero_stage(ds_config) != 3:
        return "stock"
    where = at(ds_config, "zero_optimization.offload_param.device")
    if where == "nvme":
        return "nvme"
    if engine.base_partition == "rank":
        return "ram" if where == "cpu" else "resident"
    return engine.base_partition


@dataclass(frozen=True)
class BaseSizes:
    """What of a base may stream, in bytes.

    Attributes:
        block, blocks: of one frozen decoder block, and their number.
        ends: of embedding and head together; end: of the larger, which has a slot of its own.
        beside: of what never moves (norms).
        holders: ranks on whose devices the parts of what streams lie; 0 where they wait in RAM or on disk.
    """

    block: int
    blocks: int
    ends: int
    end: int
    beside: int
    holders: int = 0

    def on_device(self, resident: int, slots: int) -> int:
        """Bytes on one rank's device with so many blocks resident, and slots for those that are not."""
        streamed = (self.blocks - resident) * self.block + self.ends
        share = -(-streamed // self.holders) if self.holders else 0
        return (resident + min(slots, self.blocks - resident)) * self.block + self.end + self.beside + share


def resident_count(engine: EngineConfig, sizes: BaseSizes) -> int:
    """How many blocks of a streamed base stay on the device."""
    return min(engine.resident_blocks, sizes.blocks)


def slots_of(engine: EngineConfig, sizes: BaseSizes) -> int:
    """How many slots the blocks of a streamed base get: as many as `engine.base_gib` has room for, or
    `engine.block_slots`, but never more than there are blocks to load.

    Raises:
        FedSpeedError: engine.base_gib is too small even for the fewest.
    """
    resident = resident_count(engine, sizes)
    streamed = sizes.blocks - resident
    if not engine.base_gib:
        return min(engine.block_slots, streamed)
    budget = int(engine.base_gib * 2**30)
    fewest = 1 if engine.pipeline == "none" else engine.block_slots  # a pipeline's chunks are made for those
    least = min(fewest, streamed)
    found = next((n for n in range(streamed, least - 1, -1) if sizes.on_device(resident, n) <= budget), None)
    if found is None:
        needed = sizes.on_device(resident, least)
        slots = "one slot" if least == 1 else f"{least} slots"
        enough = -(-needed * 1000 // 2**30) / 1000
        raise FedSpeedError(
            f"engine.base_gib={engine.base_gib:.3g}: {slots} and what stands beside take "
            f"{needed / 2**30:.3g} GiB; set engine.base_gib={enough} or more"
        )
    return found


def offloaded(ds_config: dict) -> bool:
    """Whether the ranks' parts of a divided base wait in host RAM."""
    return at(ds_config, "zero_optimization.offload_param.device") == "cpu"


def trainable_section(ds_config: dict) -> dict:
    """The section without what concerns the base. ZeRO-3 becomes ZeRO-2: gradients and optimizer stay divided
    over a client's ranks, and what trains is whole on each while its layer is computed.
    """
    config = copy.deepcopy(ds_config)
    zero = config.setdefault("zero_optimization", {})
    for key in [k for k in zero if k.startswith("stage3_")] + ["offload_param", "sub_group_size"]:
        zero.pop(key, None)
    zero["stage"] = min(zero.get("stage", 0), 2)
    optimizer = zero.get("offload_optimizer")
    if optimizer and zero["stage"] == 0:
        del zero["offload_optimizer"]
    elif optimizer and optimizer.get("device") == "nvme":
        zero["offload_optimizer"] = {"device": "cpu"}  # DeepSpeed offloads optimizers to NVMe at stage 3 only
    return config


def pipeline_tier(engine: EngineConfig, ds_config: dict, outside: str) -> str:
    """Where a stage's part of the base lives: `resident`, or in this rank's `ram` or on its `nvme`, from
    where chunks of blocks are loaded.

    Raises:
        FedSpeedError: the configuration asks for what a pipeline cannot do.
    """
    if outside:
        raise FedSpeedError(
            f"engine.pipeline={engine.pipeline} trains inside the decoder blocks only, and {outside} is "
            "outside them; choose other "
            "adapter.targets"
        )
    if engine.tier in ("resident", "ram", "nvme"):
        return engine.tier
    if engine.tier != "auto":
        raise FedSpeedError(
            f"engine.tier={engine.tier}: a pipeline's stages are resident, or in ram or nvme of their own "
            "rank; choose one of these"
        )
    where = at(ds_config, "zero_optimization.offload_param.device")
    return {"cpu": "ram", "nvme": "nvme"}.get(where, "resident")


def layout_of(engine: EngineConfig, tier: str, blocks: int, ranks: int) -> Layout:
    """Which rank of a pipeline holds which blocks. Chunks that are loaded take half the slots, so that the
    next one is loaded meanwhile.

    Raises:
        FedSpeedError: engine.cuts do not fit.
    """
    if blocks < ranks:
        raise FedSpeedError(
            f"engine.pipeline={engine.pipeline}: {ranks} ranks for {blocks} blocks; a stage has at least "
            "one, so take fewer ranks"
        )
    if tier != "resident":
        return interleaved(blocks, ranks, max(1, engine.block_slots // 2))
    if engine.cuts == "auto":
        return stages([blocks * i // ranks for i in range(ranks + 1)])
    cuts = [0, *engine.cuts, blocks]
    if len(cuts) != ranks + 1 or any(a >= b for a, b in zip(cuts, cuts[1:])):
        raise FedSpeedError(
            f"engine.cuts={flow(engine.cuts)}: write auto, or {ranks - 1} ascending numbers between 0 and "
            f"{blocks}, the first block of each of "
            f"{ranks} stages but the first"
        )
    return stages(cuts)


def stage_section(ds_config: dict) -> dict:
    """The section for what a stage trains: it is nobody else's, so that there is nothing for ZeRO to
    divide.
    """
    config = trainable_section(ds_config)
    config["zero_optimization"] = {"stage": 0}
    return config


def pipeline_section(ds_config: dict) -> dict:
    """The section for the engine that executes a pipeline, and trains nothing itself."""
    config = {
        key: value
        for key, value in copy.deepcopy(ds_config).items()
        if key not in ("zero_optimization", "optimizer", "scheduler", "gradient_clipping")
    }
    return config | {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
