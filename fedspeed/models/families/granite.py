"""Granite 3: Llama's modules with factors on embeddings, attention scores, residuals and logits."""

from typing import TYPE_CHECKING, Any

from fedspeed.models.families.base import Family
from fedspeed.models.families.gated import gated_saved_bytes, gated_shape
from fedspeed.models.families.shape import ModelShape
from fedspeed.models.families.values import ConfigValues

if TYPE_CHECKING:
    from torch import Tensor


def shape(values: ConfigValues, name: str) -> ModelShape:
    """Read the dimensions of a Granite."""
    bias = values.flag("attention_bias", False)
    return gated_shape(
        values,
        name,
        "granite",
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=values.flag("mlp_bias", False),
        logits_copies=1,
    )


def logits(raw: "Tensor", config: Any) -> "Tensor":
    """Divide the head's output by `logits_scaling`."""
    return raw / config.logits_scaling


# The decoder itself multiplies what it is given by `embedding_multiplier`.
FAMILY = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    shape=shape,
    saved_bytes_per_token=gated_saved_bytes,
    logits=logits,
)
