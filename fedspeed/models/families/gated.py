"""What the families after Llama have in common: four projections of attention, a gated MLP, RMSNorm."""

from collections.abc import Sequence
from dataclasses import replace

from fedspeed.models.families.base import SavedBytes
from fedspeed.models.families.shape import Linear, ModelShape, Norm
from fedspeed.models.families.values import ConfigValues

NORMS_BEFORE = ("input_layernorm", "post_attention_layernorm")
TARGETS = ("q_proj", "v_proj")


def gated_shape(
    values: ConfigValues,
    name: str,
    family: str,
    *,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    tied: bool = False,
    attention_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    norms: Sequence[str] = NORMS_BEFORE,
    head_norms: str = "",
    attention_reads: str = "attention",
    window: int = 0,
    windowed: int = 0,
    logits_copies: int = 0,
    activation: tuple[str, str] = ("hidden_act", "silu"),
) -> ModelShape:
    """Read the dimensions of a family with Llama's modules.

    Args:
        family: its model_type.
        head_dim, kv_heads, tied: transformers' defaults for keys that the file leaves out; None: the hidden
            size divided by the heads, and as many as heads.
        attention_bias, output_bias, mlp_bias: whether q, k and v, the attention's output, and the MLP have
            biases.
        norms: of a block, over the hidden size.
        attention_reads: name of the tensor that q, k and v read (Linear.reads).
        activation: key of the MLP's activation function, and transformers' default.
        head_norms: "each": q and k have a norm over each head; "all": a norm over all heads together.

    Raises:
        ModelError: a number is missing or impossible.
    """
    hidden = values.number("hidden_size")
    heads = values.number("num_attention_heads")
    width = values.head_width(hidden, heads, head_dim)
    shape = ModelShape(
        name,
        family,
        hidden,
        layers=values.layers(),
        heads=heads,
        kv_heads=values.kv_heads(heads, kv_heads),
        head_dim=width,
        intermediate=values.number("intermediate_size"),
        vocab=values.number("vocab_size"),
        tied=values.flag("tie_word_embeddings", tied),
        window=window if windowed else 0,
        windowed=windowed if window else 0,
        activation_copies=values.activation_copies(*activation),
        logits_copies=logits_copies,
        final_norm=Norm("norm", hidden),
        attention_targets=TARGETS,
    )
    linears = _linears(shape, (attention_bias, output_bias, mlp_bias), attention_reads)
    own_norms = (Norm(norm, hidden) for norm in norms)
    return replace(shape, linears=linears, norms=(*_head_norms(shape, head_norms), *own_norms))


def _linears(shape: ModelShape, biases: tuple[bool, bool, bool], attention_reads: str) -> tuple[Linear, ...]:
    """Return the linear modules of a block. `biases`: of q, k and v, of the attention's output, of the
    MLP.
    """
    hidden = shape.hidden
    inner = shape.intermediate
    query = shape.heads * shape.head_dim
    key = shape.kv_heads * shape.head_dim
    attention, output, mlp = biases
    return (
        Linear("self_attn.q_proj", hidden, query, attention, attention_reads),
        Linear("self_attn.k_proj", hidden, key, attention, attention_reads),
        Linear("self_attn.v_proj", hidden, key, attention, attention_reads),
        Linear("self_attn.o_proj", query, hidden, output, "attended"),
        Linear("mlp.gate_proj", hidden, inner, mlp, "mlp"),
        Linear("mlp.up_proj", hidden, inner, mlp, "mlp"),
        Linear("mlp.down_proj", inner, hidden, mlp, "gated"),
    )


def _head_norms(shape: ModelShape, kind: str) -> list[Norm]:
    """Return the norms of q and k: none, one over each head, or one over all heads."""
    if not kind:
        return []
    widths = {
        "self_attn.q_norm": shape.heads * shape.head_dim,
        "self_attn.k_norm": shape.kv_heads * shape.head_dim,
    }
    return [
        Norm(name, shape.head_dim if kind == "each" else width, width=width) for name, width in widths.items()
    ]


def gated_saved_bytes(shape: ModelShape, saved: SavedBytes) -> int:
    """Count the bytes that autograd saves of a block with these modules, for each token.

    Norms compute in fp32 and save their input in it. Attention saves q, k, v and its output; the MLP its
    gate, the activated gate and the other factor, and what its activation function saves in between.
    """
    norms = sum(4 * norm.elements for norm in shape.norms)
    query = shape.heads * shape.head_dim
    key = saved.kv_heads * shape.head_dim
    return norms + saved.type_bytes * (
        2 * query + 2 * key + (3 + shape.activation_copies) * shape.intermediate
    )
