"""Phi-3, Phi-3.5 and Phi-4: Llama's modules with q, k and v in one matrix, and gate and up in another."""

from dataclasses import replace

from fedspeed.models.families.base import Family, SavedBytes
from fedspeed.models.families.gated import gated_shape
from fedspeed.models.families.shape import Linear, ModelShape
from fedspeed.models.families.values import ConfigValues

TARGETS = ("qkv_proj",)


def shape(values: ConfigValues, name: str) -> ModelShape:
    """Read the dimensions of a Phi-3."""
    window = values.optional_number("sliding_window", 0)
    gated = gated_shape(values, name, "phi3", window=window, windowed=values.layers())
    query = gated.heads * gated.head_dim
    key = gated.kv_heads * gated.head_dim
    hidden = gated.hidden
    inner = gated.intermediate
    linears = (
        Linear("self_attn.qkv_proj", hidden, query + 2 * key, reads="attention"),
        Linear("self_attn.o_proj", query, hidden, reads="attended"),
        Linear("mlp.gate_up_proj", hidden, 2 * inner, reads="mlp"),
        Linear("mlp.down_proj", inner, hidden, reads="gated"),
    )
    masks = 2 if values.get("resid_pdrop") else 0
    return replace(gated, linears=linears, attention_targets=TARGETS, dropout_masks=masks)


def saved_bytes(shape: ModelShape, saved: SavedBytes) -> int:
    """Count the bytes that autograd saves of a block for each token: fp32 inputs of the norms; q, k and v in
    one tensor, rotated q and k, the output of attention; gate and up in one tensor, the activated gate.
    """
    norms = sum(4 * norm.elements for norm in shape.norms)
    query = shape.heads * shape.head_dim
    key = shape.kv_heads * shape.head_dim
    repeated = saved.kv_heads * shape.head_dim
    inner = (3 + shape.activation_copies) * shape.intermediate
    fused = query + 2 * key if repeated == key else repeated  # kept whole by v, which is a part of it
    masks = shape.dropout_masks * shape.hidden
    return masks + norms + saved.type_bytes * (fused + 2 * query + repeated + inner)


FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    read_as_longrope=("yarn",),
    original_positions=4096,
    attention_targets=TARGETS,
    shape=shape,
    saved_bytes_per_token=saved_bytes,
    masks="window",
)
