"""Llama, and everything that was released under its architecture."""

from fedspeed.models.families.base import Family
from fedspeed.models.families.gated import gated_saved_bytes, gated_shape
from fedspeed.models.families.shape import ModelShape
from fedspeed.models.families.values import ConfigValues


def shape(values: ConfigValues, name: str) -> ModelShape:
    """Read the dimensions of a Llama."""
    # transformers demands it of this family, whatever head_dim says.
    values.check_heads(values.number("hidden_size"), values.number("num_attention_heads"))
    bias = values.flag("attention_bias", False)
    return gated_shape(
        values, name, "llama", attention_bias=bias, output_bias=bias, mlp_bias=values.flag("mlp_bias", False)
    )


FAMILY = Family(
    model_type="llama", architecture="LlamaForCausalLM", shape=shape, saved_bytes_per_token=gated_saved_bytes
)
