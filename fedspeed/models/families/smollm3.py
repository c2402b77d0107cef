"""SmolLM3: Llama's modules; some blocks do not rotate q and k."""

from fedspeed.models.families.base import Family
from fedspeed.models.families.gated import gated_saved_bytes, gated_shape
from fedspeed.models.families.shape import ModelShape
from fedspeed.models.families.values import ConfigValues


def shape(values: ConfigValues, name: str) -> ModelShape:
    """Read the dimensions of a SmolLM3."""
    bias = values.flag("attention_bias", False)
    window = values.optional_number("sliding_window", 0)
    if not window or not values.flag("use_sliding_window", False):
        values.check_no_window()
        window = 0
    return gated_shape(
        values,
        name,
        "smollm3",
        kv_heads=4,
        tied=True,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=values.flag("mlp_bias", False),
        window=window,
        windowed=values.windowed_blocks(_unrotated(values)) if window else 0,
    )


def _unrotated(values: ConfigValues) -> int:
    """Count the blocks that do not rotate q and k, which are those that may have a sliding window."""
    layers = values.layers()
    rotated = values.get("no_rope_layers")  # 1 for a block that rotates, in spite of its name
    if isinstance(rotated, list):
        if len(rotated) != layers:
            values.refuse(
                "no_rope_layers", f"it must have a value for each of the {layers} blocks", "correct it"
            )
        return sum(not block for block in rotated)
    return layers // values.number("no_rope_layer_interval", 4)


FAMILY = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    shape=shape,
    saved_bytes_per_token=gated_saved_bytes,
    masks="layers",
)
