"""Compute attention on cards whose fused kernels do not support grouped queries."""

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

REPEATED = "sdpa_repeated"
_GROUPED_FROM = (8, 0)  # CUDA compute capability: Ampere, where flash attention begins


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
