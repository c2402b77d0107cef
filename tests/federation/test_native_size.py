"""The size of FederatedScope-LLM's messages."""

import base64

import numpy as np
import pytest

from fedspeed.federation.methods.fs_llm.native_size import VALUE_BYTES, base64_bytes


@pytest.mark.parametrize(("dtype", "kind"), [("fp32", np.float32), ("fp16", np.float16)])
def test_each_tensor_takes_the_base64_of_its_values(dtype, kind):
    """Padded to whole groups of 3 bytes in each tensor."""
    shapes = {"none": (0, 3), "one": (1,), "two": (2, 1), "a": (8, 5), "b": (7, 3, 11), "scalar": ()}
    expected = sum(len(base64.b64encode(np.zeros(shape, kind).tobytes())) for shape in shapes.values())
    assert base64_bytes(shapes, dtype) == expected
    assert VALUE_BYTES[dtype] == kind().itemsize


def test_lora_of_a_7b_model():
    """LLaMA-7B with LoRA of rank 8 on query and value: 4.19 M values in 128 tensors, 22.4 MB."""
    modules = [(layer, module, factor) for layer in range(32) for module in "qv" for factor in "AB"]
    shapes = {f"{layer}.{module}.{factor}": (8, 4096) for layer, module, factor in modules}
    assert base64_bytes(shapes, "fp32") == 128 * 174_764
