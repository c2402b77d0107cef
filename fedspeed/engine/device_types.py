"""What the devices of this machine compute in, by DeepSpeed's word and CUDA's."""

import os
import socket

from fedspeed.cluster.cards import Card, device_index
from fedspeed.errors import ModelError
from fedspeed.models.numeric_types import DeviceTypes

_BF16_FROM = (8, 0)  # CUDA compute capability: Ampere. Older cards emulate it
_FP16_FROM = (7, 0)  # Volta. Of the older ones most are slower in fp16 than in fp32


def device_types(local_rank: int | None = None) -> list[DeviceTypes]:
    """The device of a rank of this machine, or all that this process may use.

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


def own_index(local_rank: int) -> int:
    """The index of a rank's device among those that it sees.

    Args:
        local_rank: as the launcher numbers the ranks of a machine.
    """
    from deepspeed.accelerator import get_accelerator

    return device_index(local_rank, get_accelerator().device_count())


def own_card(local_rank: int) -> Card | None:
    """The GPU that a rank of this machine computes on, by the id that its maker gave it: a launcher may show
    each rank another one under the same number. None where it computes on something else than CUDA.

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
    return Card(_identity(device_index(local_rank, count)), socket.gethostname(), count)


def _identity(index: int) -> str:
    import torch

    return f"GPU-{torch.cuda.get_device_properties(index).uuid}"


def _of_gpu(accelerator, index: int) -> DeviceTypes:
    types = {"fp32"} | ({"bf16"} if _has_bf16(accelerator, index) else set())
    if accelerator.is_fp16_supported() and (
        accelerator.device_name() != "cuda" or _capability(index) >= _FP16_FROM
    ):
        types.add("fp16")
    return DeviceTypes(
        f"{accelerator.device_name()}:{index} of {socket.gethostname()}", "gpu", frozenset(types)
    )


def _has_bf16(accelerator, index: int) -> bool:
    """Without emulation, which torch counts as well."""
    return accelerator.is_bf16_supported() and (
        accelerator.device_name() != "cuda" or _capability(index) >= _BF16_FROM
    )


def _capability(index: int) -> tuple[int, int]:
    import torch

    return torch.cuda.get_device_capability(index)


def check_dtype(dtype: str, began: str = "", local_rank: int = 0) -> None:
    """Whether this machine can compute in a type. DeepSpeed would refuse too, but late, and without saying
    what to do.

    Args:
        began: the folder of a run that began in it, where that and not the configuration asks for it.
        local_rank: of the rank that is to compute in it, as the launcher numbers the ranks of a machine.

    Raises:
        ModelError: it cannot.
    """
    if dtype == "fp32":
        return
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    index = own_index(local_rank)
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
