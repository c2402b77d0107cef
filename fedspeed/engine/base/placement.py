"""What a configuration means for the frozen base (tier, slots, pipeline layout), and the DeepSpeed sections
for the trainable part. Pure functions, without torch.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from fedspeed.config.deepspeed import zero_stage
from fedspeed.config.deepspeed_rules import at
from fedspeed.config.spelling import flow
from fedspeed.engine.config import EngineConfig
from fedspeed.errors import FedSpeedError
from fedspeed.schedule.layout import Layout, interleaved, stages


def choose_tier(engine: EngineConfig, ds_config: Mapping, frozen: bool, outside: str = "") -> str:
    """Return the tier that `engine.tier` means, never auto.

    Args:
        ds_config: the DeepSpeed section.
        frozen: whether any parameter is frozen; without frozen parameters there is no base to stream.
        outside: name of a parameter that trains outside the decoder blocks, which only stock execution
            supports; empty if there is none.

    Raises:
        FedSpeedError: the tier that is asked for cannot train the trainable parameters.
    """
    if not frozen:
        return "stock"
    if outside and engine.tier not in ("auto", "stock"):
        raise FedSpeedError(
            f"engine.tier={engine.tier} trains inside the decoder blocks only, and {outside} is outside "
            "them; choose other adapter.targets, or set engine.tier=stock"
        )
    if outside:
        return "stock"
    if engine.tier != "auto":
        return engine.tier
    if zero_stage(dict(ds_config)) != 3:
        return "stock"
    where = at(ds_config, "zero_optimization.offload_param.device")
    if where == "nvme":
        return "nvme"
    if engine.base_partition == "rank":
        return "ram" if where == "cpu" else "resident"
    return engine.base_partition


@dataclass(frozen=True)
class BaseSizes:
    """Sizes of the parts of a frozen base, in bytes.

    Attributes:
        block: of one decoder block.
        blocks: number of decoder blocks.
        embedding_and_head: of embedding and head together.
        shared_slot: of the larger of these two, which share a slot.
        resident: of what always stays on the device (norms outside the blocks).
        holders: number of ranks on whose devices the streamed units are partitioned; 0 where they are stored
            in RAM or on disk.
    """

    block: int
    blocks: int
    embedding_and_head: int
    shared_slot: int
    resident: int
    holders: int = 0

    def on_device(self, resident_blocks: int, slots: int) -> int:
        """Return the bytes on one rank's device with some blocks resident, and slots for the streamed
        ones.
        """
        streamed_blocks = self.blocks - resident_blocks
        streamed = streamed_blocks * self.block + self.embedding_and_head
        shard = -(-streamed // self.holders) if self.holders else 0
        blocks_on_device = resident_blocks + min(slots, streamed_blocks)
        return blocks_on_device * self.block + self.shared_slot + self.resident + shard


def resident_count(engine: EngineConfig, sizes: BaseSizes) -> int:
    """Return how many blocks of a streamed base stay on the device."""
    return min(engine.resident_blocks, sizes.blocks)


def slots_of(engine: EngineConfig, sizes: BaseSizes) -> int:
    """Return the number of slots for the blocks of a streamed base: as many as fit into `engine.base_gib`, or
    `engine.block_slots`, but never more than there are blocks to load.

    Raises:
        FedSpeedError: engine.base_gib is too small even for the smallest number.
    """
    resident = resident_count(engine, sizes)
    streamed = sizes.blocks - resident
    if not engine.base_gib:
        return min(engine.block_slots, streamed)
    budget = int(engine.base_gib * 2**30)
    fewest = 1 if engine.pipeline == "none" else engine.block_slots  # a pipeline's chunks need block_slots
    least = min(fewest, streamed)
    fitting = (n for n in range(streamed, least - 1, -1) if sizes.on_device(resident, n) <= budget)
    count = next(fitting, None)
    if count is None:
        needed = sizes.on_device(resident, least)
        slots = "one slot" if least == 1 else f"{least} slots"
        enough = -(-needed * 1000 // 2**30) / 1000
        raise FedSpeedError(
            f"engine.base_gib={engine.base_gib:.3g}: {slots} and the rest of the base take "
            f"{needed / 2**30:.3g} GiB; set engine.base_gib={enough} or more"
        )
    return count


def offloaded(ds_config: Mapping) -> bool:
    """Tell whether the shards of a partitioned base are stored in host RAM."""
    return at(ds_config, "zero_optimization.offload_param.device") == "cpu"


def trainable_section(ds_config: dict) -> dict:
    """Return the DeepSpeed section for the trainable part of a streamed engine, without the settings for the
    base. ZeRO-3 becomes ZeRO-2: gradients and optimizer state stay partitioned over a client's ranks, and
    each rank has whole trainable tensors.
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


def pipeline_tier(engine: EngineConfig, ds_config: Mapping, outside: str) -> str:
    """Return where a pipeline stage stores its part of the base: `resident`, or in this rank's `ram` or on
    its `nvme`, from where chunks of blocks are loaded.

    Raises:
        FedSpeedError: the configuration asks for something that a pipeline does not support.
    """
    if outside:
        raise FedSpeedError(
            f"engine.pipeline={engine.pipeline} trains inside the decoder blocks only, and {outside} is "
            "outside them; choose other adapter.targets"
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
    """Decide which rank of a pipeline computes which blocks. A streamed chunk takes half of the slots, so
    that the next one can be prefetched.

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
            f"{blocks}, the first block of each of {ranks} stages but the first"
        )
    return stages(cuts)


def stage_section(ds_config: dict) -> dict:
    """Return the DeepSpeed section for the trainable tensors of a pipeline stage. No other rank has them, so
    ZeRO has nothing to partition.
    """
    config = trainable_section(ds_config)
    config["zero_optimization"] = {"stage": 0}
    return config


def pipeline_section(ds_config: dict) -> dict:
    """Return the DeepSpeed section for the engine that executes a pipeline and trains nothing itself."""
    config = {
        key: value
        for key, value in copy.deepcopy(ds_config).items()
        if key not in ("zero_optimization", "optimizer", "scheduler", "gradient_clipping")
    }
    return config | {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
