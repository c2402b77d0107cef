"""Qwen2 and Qwen2.5: Llama's modules with biases on q, k and v, and sliding windows in the upper blocks where
config.json asks for them.
"""

from fedspeed.models.families.base import Family
from fedspeed.models.families.gated import gated_saved_bytes, gated_shape
from fedspeed.models.families.shape import ModelShape
from fedspeed.models.families.values import ConfigValues


def shape(values: ConfigValues, name: str) -> ModelShape:
    """Read the dimensions of a Qwen2."""
    return gated_shape(values, name, "qwen2", kv_heads=32, attention_bias=True)


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    shape=shape,
    saved_bytes_per_token=gated_saved_bytes,
    masks="layers",
)
