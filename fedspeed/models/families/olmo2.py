"""OLMo 2: Llama's modules with the norms behind attention and MLP, and norms over all of q and k."""

from fedspeed.models.families.base import Family
from fedspeed.models.families.gated import gated_saved_bytes, gated_shape
from fedspeed.models.families.shape import BLOCK_INPUT, ModelShape
from fedspeed.models.families.values import ConfigValues


def shape(values: ConfigValues, name: str) -> ModelShape:
    """Read the dimensions of an OLMo 2."""
    bias = values.flag("attention_bias", False)
    return gated_shape(
        values,
        name,
        "olmo2",
        attention_bias=bias,
        output_bias=bias,
        norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        head_norms="all",
        attention_reads=BLOCK_INPUT,
    )


FAMILY = Family(
    model_type="olmo2", architecture="Olmo2ForCausalLM", shape=shape, saved_bytes_per_token=gated_saved_bytes
)
