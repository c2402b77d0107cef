"""Qwen2 and Qwen2.5: Llama's modules with biases on q, k and v, and sliding windows in the upper blocks where
config.json asks for them.
"""

from fedspeed.models.families.base import Family
from fedspeed.models.families.gated import gated_saved_bytes, gated_shape
from fedspeed.models.families.shape import ModelShape
from fedspeed.models.families.values import ConfigValues


def upper_window(values: ConfigValues) -> tuple[int, int]:
    """Read (length of the sliding window, number of blocks that have it) of a Qwen2 or Qwen3."""
    window = values.optional_number("sliding_window", 4096)
    if not window or not values.flag("use_sliding_window", False):
        values.check_no_window()
        return 0, 0
    full = values.number("max_window_layers", 28, least=0)
    return window, values.windowed_blocks(max(0, values.layers() - full))


def shape(values: ConfigValues, name: str) -> ModelShape:
    """Read the dimensions of a Qwen2."""
    window, windowed = upper_window(values)
    return gated_shape(
        values, name, "qwen2", kv_heads=32, attention_bias=True, window=window, windowed=windowed
    )


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    shape=shape,
    saved_bytes_per_token=gated_saved_bytes,
    masks="layers",
)
