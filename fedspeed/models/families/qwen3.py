"""Qwen3: Llama's modules with a norm over each head of q and k; sliding windows as in Qwen2."""

from fedspeed.models.families.base import Family
from fedspeed.models.families.gated import gated_saved_bytes, gated_shape
from fedspeed.models.families.qwen2 import upper_window
from fedspeed.models.families.shape import ModelShape
from fedspeed.models.families.values import ConfigValues


def shape(values: ConfigValues, name: str) -> ModelShape:
    """Read the dimensions of a Qwen3."""
    bias = values.flag("attention_bias", False)
    window, windowed = upper_window(values)
    return gated_shape(
        values,
        name,
        "qwen3",
        head_dim=128,
        kv_heads=32,
        attention_bias=bias,
        output_bias=bias,
        head_norms="each",
        window=window,
        windowed=windowed,
    )


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    shape=shape,
    saved_bytes_per_token=gated_saved_bytes,
    masks="layers",
)
