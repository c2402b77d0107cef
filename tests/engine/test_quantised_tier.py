"""Quantised tiers dequantise a unit into the memory where it is needed."""

from importlib.util import find_spec

import pytest

from tests.engine.engines import OPTIONAL, find_optional
from tests.processes import run_ranks


def dequantised(rank):
    """Return by kind, and by whether there is a kernel that writes into given memory: (whether the unit has
    the values of bitsandbytes, the peak of temporary bytes, the bytes of the matrix). The CPU has no such
    kernel; the one registered here copies the known values.
    """
    import torch

    assert find_optional()
    import bitsandbytes.functional as library

    from fedspeed.engine.base.layout import pack
    from fedspeed.engine.base.quantised import QuantisedTier
    from fedspeed.engine.memory_counter import TensorMemoryCounter

    unit = pack("block", [("matrix", torch.Size([64, 128])), ("bias", torch.Size([64]))], torch.bfloat16)
    data = torch.zeros(unit.nbytes, dtype=torch.uint8)
    seen = {}
    for tensor in unit.tensors:
        unit.view(data, tensor).copy_(torch.randn(tensor.shape))
    for kind, name in (("int8", "dequantize_blockwise"), ("nf4", "dequantize_4bit")):
        tier = QuantisedTier({0: unit}, kind)
        tier.put(0, data)
        (values, state), (bias, _) = tier._parts[0]
        exact = getattr(library, name)(values, state)
        for kernel in (False, True):
            if kernel:
                torch.library.impl(
                    f"bitsandbytes::{name}.out", "cpu", lambda *args: (args[-1].copy_(exact), None)[1]
                )
            into = torch.full((unit.nbytes,), 0xFF, dtype=torch.uint8)
            with TensorMemoryCounter() as live:
                tier.fetch(0, into, None).wait()
            matrix, other = (unit.view(into, tensor) for tensor in unit.tensors)
            seen[kind, kernel] = (
                bool((matrix == exact).all() and (other == bias).all()),
                live.peak,
                matrix.numel() * 2,
            )
    return seen


@pytest.mark.skipif(
    not (OPTIONAL / "bitsandbytes").is_dir() and find_spec("bitsandbytes") is None,
    reason="needs bitsandbytes, which bash launchers/test.sh installs",
)
def test_quantised_units_are_computed_where_they_are_needed():
    [seen] = run_ranks(1, dequantised)
    assert len(seen) == 4 and all(equal for equal, *_ in seen.values())
    for (_, kernel), (_, peak, matrix) in seen.items():
        assert peak == 0 if kernel else peak >= matrix
