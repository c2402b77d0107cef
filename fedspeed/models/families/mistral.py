"""Mistral: Llama's modules; where config.json has a sliding window, all blocks have it."""

from fedspeed.models.families.base import Family
from fedspeed.models.families.gated import gated_saved_bytes, gated_shape
from fedspeed.models.families.shape import ModelShape
from fedspeed.models.families.values import ConfigValues


def shape(values: ConfigValues, name: str) -> ModelShape:
    """Read the dimensions of a Mistral."""
    if values.has("layer_types"):
        values.refuse(
            "layer_types",
            "transformers reads a mistral with layer_types as a ministral, another family",
            "take a model without them",
        )
    window = values.optional_number("sliding_window", 4096)
    return gated_shape(values, name, "mistral", kv_heads=8, window=window, windowed=values.layers())


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    shape=shape,
    saved_bytes_per_token=gated_saved_bytes,
    masks="window",
)
