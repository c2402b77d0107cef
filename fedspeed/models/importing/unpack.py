"""Dequantisation of single matrices, in fp32.

The layouts are those in which AutoGPTQ and GPTQModel (GPTQ), AutoAWQ (AWQ, version gemm) and DeepSeek-V3 (fp8
with a scale for each block) write matrices of linear modules. All return [out, in], as torch's Linear has it.
"""

import torch

from fedspeed.models.quantisation import Quantisation

# Number of the column, within the eight of a 32-bit integer, at each place from its lowest four bits upwards.
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the unsigned values in 32-bit integers, the lowest bits first.

    Args:
        packed: [rows, columns] int32. bits: of a value; divides 32.

    Returns:
        [rows, columns, 32 / bits] int32.
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)


def fp8_weight(weight: torch.Tensor, scale_inv: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Return a matrix whose blocks were divided by a scale each and rounded to 8 bits.

    Args:
        weight: [out, in] float8. scale_inv: [ceil(out / block), ceil(in / block)]; values are multiplied by
            it. block: rows and columns of a block; those at the edges may be smaller.
    """
    rows, columns = weight.shape
    scales = scale_inv.float().repeat_interleave(block[0], 0)[:rows]
    return weight.float() * scales.repeat_interleave(block[1], 1)[:, :columns]


def gptq_weight(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    quantisation: Quantisation,
) -> torch.Tensor:
    """Return a matrix in GPTQ's layout, scale * (q - zero) by group of inputs.

    Args:
        qweight: [in * bits / 32, out] int32; each integer holds consecutive inputs.
        qzeros: [groups, out * bits / 32] int32. scales: [groups, out].
        g_idx: group of each input, [in] int32; None: inputs are in the order of the groups.
    """
    bits = quantisation.bits
    out = qweight.shape[1]
    values = unpacked(qweight, bits).transpose(1, 2).reshape(-1, out)
    zeros = unpacked(qzeros, bits).flatten(1)
    if quantisation.zeros_less_one:
        zeros = (zeros + 1) & ((1 << bits) - 1)  # a zero point of 0 is stored as -1, all bits set
    if g_idx is None:
        g_idx = torch.arange(len(values)) // (quantisation.group_size or len(values))
    groups = g_idx.long()
    return (scales.float()[groups] * (values - zeros[groups])).T.contiguous()


def awq_weight(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, quantisation: Quantisation
) -> torch.Tensor:
    """Return a matrix in AWQ's layout, scale * (q - zero) by group of inputs.

    Args:
        qweight: [in, out / 8] int32; each integer holds eight outputs in the order of `AWQ_COLUMNS`.
        qzeros: [groups, out / 8] int32. scales: [groups, out].
    """
    order = torch.tensor(AWQ_COLUMNS).argsort()
    values = unpacked(qweight, quantisation.bits)[..., order].flatten(1)
    zeros = unpacked(qzeros, quantisation.bits)[..., order].flatten(1)
    groups = torch.arange(len(values)) // (quantisation.group_size or len(values))
    return (scales.float()[groups] * (values - zeros[groups])).T.contiguous()
