"""Which tier a configuration means, and what is left of its DeepSpeed section for the part that trains. Pure."""

import copy

from fedspeed.config.deepspeed import zero_stage
from fedspeed.config.deepspeed_rules import at
from fedspeed.engine.config import EngineConfig
from fedspeed.errors import FedSpeedError


def choose_tier(engine: EngineConfig, ds_config: dict, frozen: bool) -> str:
    """A tier of `EngineConfig.tier` other than auto.

    Args:
        frozen: whether anything of the model is frozen; where all of it trains, there is no base to stream.
    """
    if not frozen:
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


def blocks_within(budget: int, block: int, blocks: int, slots: int, beside: int) -> int:
    """How many blocks may stay on the device if the base shall take no more than `budget` bytes there.

    Args:
        block: bytes of one; a slot has as many. beside: bytes of what else of the base needs a place there (the end slot).

    Raises:
        FedSpeedError: the budget is too small even for the slots.
    """
    if budget >= blocks * block + beside:
        return blocks
    left = budget - slots * block - beside
    if left < 0:
        raise FedSpeedError(f"engine.base_gib={budget / 2**30:.3g}: {slots} slots and what stands beside them take {(slots * block + beside) / 2**30:.3g} GiB; "
                            f"set engine.base_gib={-(-(slots * block + beside) * 1000 // 2**30) / 1000} or more, or fewer engine.slots")
    return min(left // block, blocks - slots)


def offloaded(ds_config: dict) -> bool:
    """Whether the ranks' parts of a divided base wait in host RAM."""
    return at(ds_config, "zero_optimization.offload_param.device") == "cpu"


def for_trainable(ds_config: dict) -> dict:
    """The section without what concerns the base. ZeRO-3 becomes ZeRO-2: gradients and optimizer stay divided over a client's ranks, and what
    trains is whole on each while its layer is computed."""
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


def host_inputs(engine: EngineConfig) -> bool:
    """Whether the inputs of blocks wait in host RAM."""
    if engine.block_inputs != "auto":
        return engine.block_inputs == "host"
    from deepspeed.accelerator import get_accelerator

    return not get_accelerator().is_synchronized_device()
