"""Compute attention with grouped queries on cards whose fused kernels do not support them, and attention to a
part of the keys.
"""

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

REPEATED = "sdpa_repeated"
# Implementations, by transformers' names, that compute scaled dot products, a mask, and nothing else.
DOT_PRODUCT = ("sdpa", REPEATED)
_GROUPED_FROM = (8, 0)  # CUDA compute capability: Ampere, where flash attention begins

Partial = tuple[torch.Tensor, torch.Tensor]  # output [..., T, width], log-sum-exp of scores [..., T] fp32


def choose_attention(model: PreTrainedModel) -> None:
    """Let a model repeat keys and values where its card would otherwise compute grouped queries by torch's
    plain kernel, which holds all T x T scores.
    """
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cuda" and torch.cuda.get_device_capability() < _GROUPED_FROM:
        repeat_keys(model)


def repeat_keys(model: PreTrainedModel) -> None:
    """Let a model compute its attention by `repeated_attention`."""
    AttentionInterface.register(REPEATED, repeated_attention)
    AttentionMaskInterface.register(REPEATED, sdpa_mask)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.set_attn_implementation(REPEATED)


def repeated_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Compute attention with a key and a value for each query head.

    Args:
        query: [B, heads, T, width]; key, value: [B, key heads, T, width].

    Returns:
        ([B, T, heads, width], no weights).
    """
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, 1)
    value = value.repeat_interleave(groups, 1)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and attention_mask is None and query.shape[2] > 1
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout_p=dropout, is_causal=causal, scale=scaling
    )
    return output.transpose(1, 2).contiguous(), None


def gives_log_sum_exp(key: torch.Tensor, value: torch.Tensor) -> bool:
    """Tell whether `partial_attention` has a kernel for such keys and values."""
    return key.device.type == "cpu" and key.shape[-1] == value.shape[-1]


def partial_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
) -> Partial:
    """Compute attention to some of the keys that the queries attend to, for merging with attention to others.

    Args:
        query: [B, heads, T, width]; key, value: [B, heads, slots, width].
        mask: what is added to scores, [B, 1, T, slots]. scaling: factor of scores; None: 1 / sqrt(width).
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, log_sum_exp = kernel(query, key, value, attn_mask=mask, scale=scaling)
    return output, log_sum_exp
