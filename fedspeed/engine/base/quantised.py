"""The frozen base on the device in fewer bits."""

from dataclasses import dataclass

import torch
from deepspeed.accelerator import get_accelerator

from fedspeed.engine.base.layout import Unit
from fedspeed.engine.base.tier import Tier
from fedspeed.errors import FedSpeedError


class QuantisedTier(Tier):
    """On the device in 8 or 4 bits; loading computes the model's own type anew. Only matrices: norms and
    biases keep all their bits.

    By bitsandbytes: int8 with one scale for 256 weights, or NF4 (Dettmers et al., 2023) with one for 64.

    Raises:
        FedSpeedError: bitsandbytes is not installed.
    """

    def __init__(self, units: dict[int, Unit], name: str):
        try:
            import bitsandbytes.functional
        except ImportError as error:
            raise FedSpeedError(
                f"engine.tier={name} needs bitsandbytes: pip install -r requirements-quantised.txt ({error})"
            ) from error
        self.name = name
        self._units = units
        self._library = bitsandbytes.functional
        self._parts: dict[
            int, list[tuple]
        ] = {}  # of each piece: (values, state); the state is None where the values are exact

    def put(self, index: int, data: torch.Tensor) -> None:
        data = data.to(get_accelerator().current_device_name())
        unit = self._units[index]
        self._parts[index] = [self._quantise(unit.view(data, piece)) for piece in unit.pieces]

    def _quantise(self, weight: torch.Tensor) -> tuple:
        if weight.dim() < 2:
            return weight.clone(), None
        if self.name == "int8":
            return self._library.quantize_blockwise(weight, blocksize=256)
        return self._library.quantize_4bit(weight, blocksize=64, quant_type="nf4")

    def _write(self, values: torch.Tensor, state, into: torch.Tensor) -> None:
        """Compute a piece's own values where they are needed; without another copy where bitsandbytes can."""
        if state is None:
            into.copy_(values)
            return
        name = "dequantize_blockwise" if self.name == "int8" else "dequantize_4bit"
        dequantise = getattr(self._library, name)
        device = into.device.type.upper()
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"bitsandbytes::{name}.out", device):
            dequantise(values, state, out=into)
        else:  # it has none for CPUs
            into.copy_(dequantise(values, state))

    def fetch(self, index: int, into: torch.Tensor, free) -> "_Dequantised":
        return _Dequantised(self, index, into)

    def write(self, index: int, into: torch.Tensor) -> int:
        """Compute the unit's own bytes into a slot; returns how many bytes were read for it."""
        for piece, (values, state) in zip(self._units[index].pieces, self._parts[index]):
            self._write(values, state, self._units[index].view(into, piece))
        return sum(values.numel() * values.element_size() for values, _ in self._parts[index])

    def close(self) -> None:
        self._parts.clear()


@dataclass
class _Dequantised:
    """There is nothing to run ahead with: it is the device's own arithmetic, made when it is needed."""

    tier: QuantisedTier
    index: int
    into: torch.Tensor

    def wait(self) -> int:
        return self.tier.write(self.index, self.into)
