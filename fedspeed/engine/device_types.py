"""The numeric types in which the devices of this machine compute, according to DeepSpeed and CUDA."""

import os
import socket
from typing import Any

from fedspeed.cluster.gpus import Gpu, device_index
from fedspeed.errors import ModelError
from fedspeed.models.numeric_types import DeviceTypes

_BF16_FROM = (8, 0)  # CUDA compute capability of Ampere; older GPUs emulate bf16
_FP16_FROM = (7, 0)  # of Volta; most older GPUs are slower in fp16 than in fp32


def device_types(local_rank: int | None = None) -> list[DeviceTypes]:
    """Return the types of a rank's device, or those of all devices that this process may use.

    Args:
        local_rank: as the launcher numbers the ranks of a machine; None for all devices.
    """
    cpu = [DeviceTypes(f"the cpu of {socket.gethostname()}", "cpu", frozenset({"fp32"}))]
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return cpu
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return cpu
    count = accelerator.device_count()
    return [
        _of_gpu(accelerator, index)
        for index in (range(count) if local_rank is None else [device_index(local_rank, count)])
    ]


def device_index_of_rank(local_rank: int) -> int:
    """Return the index of a rank's device among those visible to it.

    Args:
        local_rank: as the launcher numbers the ranks of a machine.
    """
    from deepspeed.accelerator import get_accelerator

    return device_index(local_rank, get_accelerator().device_count())


def gpu_of_rank(local_rank: int) -> Gpu | None:
    """Return the GPU that a rank of this machine computes on, identified by its UUID: a launcher may make a
    different GPU visible to each rank under the same index. None if the rank does not compute on CUDA.

    Args:
        local_rank: as the launcher numbers the ranks of a machine.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return None
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() != "cuda":
        return None
    count = accelerator.device_count()
    return Gpu(_identity(device_index(local_rank, count)), socket.gethostname(), count)


def _identity(index: int) -> str:
    import torch

    return f"GPU-{torch.cuda.get_device_properties(index).uuid}"


def _of_gpu(accelerator: Any, index: int) -> DeviceTypes:
    types = {"fp32"} | ({"bf16"} if _has_bf16(accelerator, index) else set())
    if accelerator.is_fp16_supported() and (
        accelerator.device_name() != "cuda" or _capability(index) >= _FP16_FROM
    ):
        types.add("fp16")
    return DeviceTypes(
        f"{accelerator.device_name()}:{index} of {socket.gethostname()}", "gpu", frozenset(types)
    )


def _has_bf16(accelerator: Any, index: int) -> bool:
    """Tell whether a device computes in bf16 without emulation, which torch's own answer includes."""
    return accelerator.is_bf16_supported() and (
        accelerator.device_name() != "cuda" or _capability(index) >= _BF16_FROM
    )


def _capability(index: int) -> tuple[int, int]:
    import torch

    return torch.cuda.get_device_capability(index)


def check_dtype(dtype: str, began: str = "", local_rank: int = 0) -> None:
    """Check that this machine can compute in a type. DeepSpeed would refuse too, but later and without a
    remedy.

    Args:
        began: the folder of the run, where a resumed run requires the type and not the configuration.
        local_rank: of the rank that computes, as the launcher numbers the ranks of a machine.

    Raises:
        ModelError: it cannot.
    """
    if dtype == "fp32":
        return
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    index = device_index_of_rank(local_rank)
    able = {"fp32": True, "bf16": _has_bf16(accelerator, index), "fp16": accelerator.is_fp16_supported()}
    if not able[dtype]:
        machine = f"the {accelerator.device_name()} of {socket.gethostname()} cannot compute in it"
        if began:
            raise ModelError(
                f"model.dtype={dtype}, in which the run in {began} began: {machine}; resume it on devices "
                "that can, or start anew with --fresh"
            )
        raise ModelError(
            f"model.dtype={dtype}: {machine}; choose "
            f"{' or '.join(name for name, can in able.items() if can)}, or model.dtype=auto"
        )
