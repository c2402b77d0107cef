"""GPT-2: a learned table of positions, LayerNorm, q, k and v in one matrix, and weights stored [in, out]."""

from fedspeed.models.families.base import Family, PositionTable, SavedBytes
from fedspeed.models.families.shape import Linear, ModelShape, Norm
from fedspeed.models.families.values import MAX_LAYERS, ConfigValues

TABLE = PositionTable(parameter="transformer.wpe.weight", key="n_positions", default=1024)
TARGETS = ("c_attn",)


def shape(values: ConfigValues, name: str) -> ModelShape:
    """Read the dimensions of a GPT-2."""
    hidden = values.number("n_embd")
    heads = values.number("n_head")
    inner = values.number("n_inner", 4 * hidden)
    values.check_heads(hidden, heads)
    return ModelShape(
        name,
        "gpt2",
        hidden,
        layers=values.number("n_layer", largest=MAX_LAYERS),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=inner,
        vocab=values.number("vocab_size"),
        tied=values.flag("tie_word_embeddings", True),
        positions=values.number(TABLE.key, TABLE.default),
        linears=(
            Linear("attn.c_attn", hidden, 3 * hidden, True, "attention", transposed=True),
            Linear("attn.c_proj", hidden, hidden, True, "attended", transposed=True),
            Linear("mlp.c_fc", hidden, inner, True, "mlp", transposed=True),
            Linear("mlp.c_proj", inner, hidden, True, "activated", transposed=True),
        ),
        norms=(Norm("ln_1", hidden, bias=True), Norm("ln_2", hidden, bias=True)),
        activation_copies=values.activation_copies("activation_function", "gelu_new"),
        final_norm=Norm("ln_f", hidden, bias=True),
        attention_targets=TARGETS,
    )


def saved_bytes(shape: ModelShape, saved: SavedBytes) -> int:
    """Count the bytes that autograd saves of a block for each token: the norms' inputs; q, k and v, in one
    tensor and apart, and the attention's output; masks of two dropouts; the input of GELU and what it
    saves in between.
    """
    return (
        saved.type_bytes * (8 * shape.hidden + (1 + shape.activation_copies) * shape.intermediate)
        + 2 * shape.hidden
    )


FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    decoder="transformer.",
    blocks="h.",
    embedding="transformer.wte.weight",
    final_norm="ln_f",
    table=TABLE,
    attention_targets=TARGETS,
    transposed=True,
    shape=shape,
    saved_bytes_per_token=saved_bytes,
)
