"""The inverse of dequantisation: matrices packed in the layouts of GPTQ, AWQ and block-scaled fp8, with numpy
and Python integers, and whole models of them.
"""

import json

import numpy as np
import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def integers(values: list[list[int]], bits: int) -> int:
    """Return one 32-bit integer, signed, of unsigned values, the lowest bits first."""
    whole = sum(int(value) << (bits * place) for place, value in enumerate(values))
    return whole - (1 << 32) if whole >= 1 << 31 else whole


def packed_columns(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Pack each row of [rows, columns] into integers, [rows, columns * bits / 32]."""
    count = 32 // bits
    order = order or tuple(range(count))
    rows = [
        [integers([row[start + place] for place in order], bits) for start in range(0, len(row), count)]
        for row in values.tolist()
    ]
    return torch.tensor(rows, dtype=torch.int32)


def quantised(weight: torch.Tensor, bits: int, groups: np.ndarray, rng) -> tuple:
    """Return values [in, out], zero points and scales [groups, out] that stand for some matrix near `weight`
    [out, in], and the matrix itself, in fp32.
    """
    inputs = weight.float().numpy().T
    count = int(groups.max()) + 1
    largest = (1 << bits) - 1
    scales = np.zeros((count, inputs.shape[1]), np.float16)
    zeros = rng.integers(0, largest + 1, (count, inputs.shape[1]))
    zeros[0, :2] = (0, largest)
    for group in range(count):
        scales[group] = np.abs(inputs[groups == group]).max(0) / largest * 2 + 1e-3
    values = np.clip(np.round(inputs / scales[groups].astype(np.float32)) + zeros[groups], 0, largest)
    exact = scales[groups].astype(np.float32) * (values - zeros[groups]).astype(np.float32)
    return values.astype(np.int64), zeros, scales, torch.from_numpy(np.ascontiguousarray(exact.T))


def gptq(weight, *, bits=4, group_size=32, act_order=False, v2=False, seed=0):
    """Return (tensors by suffix, the matrix that they stand for)."""
    rng = np.random.default_rng(seed)
    inputs = weight.shape[1]
    groups = np.arange(inputs) // (group_size or inputs)
    if act_order:
        groups = rng.permutation(groups)
    values, zeros, scales, exact = quantised(weight, bits, groups, rng)
    stored = zeros if v2 else (zeros - 1) % (1 << bits)
    return {
        ".qweight": packed_columns(values.T, bits).T.contiguous(),
        ".qzeros": packed_columns(stored, bits),
        ".scales": torch.from_numpy(scales),
        ".g_idx": torch.from_numpy(groups.astype(np.int32)),
    }, exact


def awq(weight, *, group_size=32, seed=0):
    """Return (tensors by suffix, the matrix that they stand for)."""
    groups = np.arange(weight.shape[1]) // (group_size or weight.shape[1])
    values, zeros, scales, exact = quantised(weight, 4, groups, np.random.default_rng(seed))
    return {
        ".qweight": packed_columns(values, 4, AWQ_ORDER),
        ".qzeros": packed_columns(zeros, 4, AWQ_ORDER),
        ".scales": torch.from_numpy(scales),
    }, exact


def fp8(weight, *, block=(32, 32), seed=0):
    """Return (tensors by suffix, the matrix that they stand for)."""
    rows, columns = weight.shape
    scales = torch.zeros(-(-rows // block[0]), -(-columns // block[1]))
    values = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
    exact = torch.zeros(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = weight[part].float().abs().max() / 448
            values[part] = (weight[part].float() / scales[i, j]).to(torch.float8_e4m3fn)
            exact[part] = values[part].float() * scales[i, j]
    return {".weight": values, ".weight_scale_inv": scales}, exact


SECTIONS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False},
    "gptq_v2": {"quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"},
    "gptq act-order": {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    "fp8": {"quant_method": "fp8", "weight_block_size": [32, 48], "activation_scheme": "dynamic"},
}
PACK = {
    "gptq": gptq,
    "gptq_v2": lambda weight: gptq(weight, bits=8, group_size=0, v2=True),
    "gptq act-order": lambda weight: gptq(weight, group_size=16, act_order=True),
    "awq": awq,
    "fp8": lambda weight: fp8(weight, block=(32, 48)),
}


def quantise_model(folder, kind: str) -> dict[str, torch.Tensor]:
    """Quantise the linear modules of the blocks of a model in a folder; return the tensors of the model that
    they stand for.
    """
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    stored = {}
    exact = {}
    for name, tensor in load_file(path).items():
        if not name.endswith("proj.weight"):
            stored[name] = tensor
            exact[name] = tensor
            continue
        parts, exact[name] = PACK[kind](tensor)
        stored |= {name.removesuffix(".weight") + suffix: part for suffix, part in parts.items()}
    save_file(stored, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": SECTIONS[kind]}
    (folder / "config.json").write_text(json.dumps(config))
    return exact
