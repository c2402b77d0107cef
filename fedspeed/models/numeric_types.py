"""Which numeric type a federation computes in where the configuration leaves it open. Pure: the planner, the
dry run and a run ask the same rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedspeed.units import shortened_list

NumericType = Literal["fp32", "bf16", "fp16"]
NAMES: tuple[NumericType, ...] = ("fp32", "bf16", "fp16")
# As torch and a config.json call them.
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class DeviceTypes:
    """A device and the types it computes in at full speed, of NAMES. `name` says whose it is, for
    messages.
    """

    name: str
    kind: Literal["cpu", "gpu"]
    types: frozenset[str]


def lowest_common(devices: Sequence[DeviceTypes]) -> NumericType:
    """Return the type with the fewest bits that all devices have: on GPUs bf16, or fp16 where one is too old
    for bf16. Where a CPU takes part, it is fp32: most CPUs emulate 16 bits, at a fraction of the speed, and
    many refuse fp16 altogether.
    """
    if devices and all(device.kind == "gpu" for device in devices):
        candidates: tuple[NumericType, ...] = ("bf16", "fp16")
        for name in candidates:
            if all(name in device.types for device in devices):
                return name
    return "fp32"


def explanation(dtype: str, devices: Sequence[DeviceTypes]) -> str:
    """Describe the type that model.dtype=auto has become, and which devices decided it."""
    if dtype == "bf16":
        return "model.dtype=bf16 (auto: every GPU has it)"
    too_old = sorted({device.name for device in devices if dtype == "fp16" and "bf16" not in device.types})
    deciding = too_old or sorted({
        device.name for device in devices if device.kind == "cpu" or "fp16" not in device.types
    })
    lack = "cannot do bf16" if dtype == "fp16" else "would be slow in 16 bits"
    return f"model.dtype={dtype} (auto: {shortened_list(deciding, 3)} {lack})"
