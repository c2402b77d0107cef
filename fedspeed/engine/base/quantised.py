"""The frozen base on the device in 8 or 4 bits."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from deepspeed.accelerator import get_accelerator

from fedspeed.engine.base.layout import Unit
from fedspeed.engine.base.tier import Tier
from fedspeed.engine.device_events import DeviceEvent
from fedspeed.errors import FedSpeedError


class QuantisedTier(Tier):
    """Store units on the device in 8 or 4 bits. A load dequantises them to the model's type. Only matrices
    are quantised; norms and biases are stored exactly.

    The formats are those of bitsandbytes: int8 with one scale for 256 weights, or NF4 (Dettmers et al., 2023)
    with one for 64.

    Args:
        name: int8 or nf4.

    Raises:
        FedSpeedError: bitsandbytes is not installed.
    """

    def __init__(self, units: Mapping[int, Unit], name: str):
        try:
            import bitsandbytes.functional
        except ImportError as error:
            raise FedSpeedError(
                f"engine.tier={name} needs bitsandbytes: pip install -r requirements-quantised.txt ({error})"
            ) from error
        self.name = name
        self._units = units
        self._library = bitsandbytes.functional
        # By unit, for each tensor (values, quantisation state); the state is None where values are exact.
        self._parts: dict[int, list[tuple[torch.Tensor, object]]] = {}

    def put(self, index: int, data: torch.Tensor) -> None:
        data = data.to(get_accelerator().current_device_name())
        unit = self._units[index]
        self._parts[index] = [self._quantise(unit.view(data, tensor)) for tensor in unit.tensors]

    def _quantise(self, weight: torch.Tensor) -> tuple[torch.Tensor, object]:
        if weight.dim() < 2:
            return weight.clone(), None
        if self.name == "int8":
            return self._library.quantize_blockwise(weight, blocksize=256)
        return self._library.quantize_4bit(weight, blocksize=64, quant_type="nf4")

    def _dequantise(self, values: torch.Tensor, state: object, into: torch.Tensor) -> None:
        """Write a tensor's values into a slot, without another copy where bitsandbytes can."""
        if state is None:
            into.copy_(values)
            return
        name = "dequantize_blockwise" if self.name == "int8" else "dequantize_4bit"
        dequantise = getattr(self._library, name)
        device = into.device.type.upper()
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"bitsandbytes::{name}.out", device):
            dequantise(values, state, out=into)
        else:  # bitsandbytes has no such kernel for CPUs
            into.copy_(dequantise(values, state))

    def fetch(self, index: int, into: torch.Tensor, free: DeviceEvent | None) -> "_Dequantised":
        return _Dequantised(self, index, into)

    def write(self, index: int, into: torch.Tensor) -> int:
        """Dequantise a unit into a slot; returns how many quantised bytes were read."""
        for tensor, (values, state) in zip(self._units[index].tensors, self._parts[index]):
            self._dequantise(values, state, self._units[index].view(into, tensor))
        return sum(values.numel() * values.element_size() for values, _ in self._parts[index])

    def close(self) -> None:
        self._parts.clear()


@dataclass
class _Dequantised:
    """Handle of a load that happens when it is waited for: the device itself computes it."""

    tier: QuantisedTier
    index: int
    into: torch.Tensor

    def wait(self) -> int:
        """Dequantise the unit; returns how many bytes were read."""
        return self.tier.write(self.index, self.into)
