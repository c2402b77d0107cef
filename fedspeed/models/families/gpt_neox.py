"""GPT-NeoX and Pythia: LayerNorm, attention and MLP in parallel, q, k and v in one matrix, and rotation of a
part of each head.
"""

from fedspeed.models.families.base import Family, SavedBytes
from fedspeed.models.families.shape import Linear, ModelShape, Norm
from fedspeed.models.families.values import ConfigValues

TARGETS = ("query_key_value",)


def shape(values: ConfigValues, name: str) -> ModelShape:
    """Read the dimensions of a GPT-NeoX."""
    hidden = values.number("hidden_size")
    heads = values.number("num_attention_heads")
    inner = values.number("intermediate_size")
    bias = values.flag("attention_bias", True)
    values.check_heads(hidden, heads)
    return ModelShape(
        name,
        "gpt_neox",
        hidden,
        layers=values.layers(),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=inner,
        vocab=values.number("vocab_size"),
        tied=values.flag("tie_word_embeddings", False),
        dropout_masks=2 if values.get("hidden_dropout") else 0,
        parallel=values.flag("use_parallel_residual", True),
        linears=(
            Linear("attention.query_key_value", hidden, 3 * hidden, bias, "attention"),
            Linear("attention.dense", hidden, hidden, bias, "attended"),
            Linear("mlp.dense_h_to_4h", hidden, inner, True, "mlp"),
            Linear("mlp.dense_4h_to_h", inner, hidden, True, "activated"),
        ),
        norms=(
            Norm("input_layernorm", hidden, bias=True),
            Norm("post_attention_layernorm", hidden, bias=True),
        ),
        activation_copies=values.activation_copies("hidden_act", "gelu"),
        final_norm=Norm("final_layer_norm", hidden, bias=True),
        attention_targets=TARGETS,
    )


def saved_bytes(shape: ModelShape, saved: SavedBytes) -> int:
    """Count the bytes that autograd saves of a block for each token: the norms' inputs, which are the block's
    own where attention and MLP are parallel; q, k and v in one tensor, rotated q and k, and the attention's
    output; the input of the MLP's activation function, and what that saves in between.
    """
    norms = 0 if shape.parallel else shape.hidden
    masks = shape.dropout_masks * shape.hidden
    inner = (1 + shape.activation_copies) * shape.intermediate
    return masks + saved.type_bytes * (norms + 6 * shape.hidden + inner)


FAMILY = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    decoder="gpt_neox.",
    embedding="gpt_neox.embed_in.weight",
    stored_as=(("lm_head.weight", "embed_out.weight"),),
    final_norm="final_layer_norm",
    attention_targets=TARGETS,
    shape=shape,
    saved_bytes_per_token=saved_bytes,
)
