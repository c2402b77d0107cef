"""Qwen3 with a mixture of experts, such as Qwen3-30B-A3B: attention of Qwen3, and in place of each MLP many
small ones, of which a router chooses some for every token.
"""

from dataclasses import replace

from fedspeed.models.families.base import Family, SavedBytes
from fedspeed.models.families.experts import STACKED, Experts
from fedspeed.models.families.gated import gated_shape
from fedspeed.models.families.shape import ModelShape
from fedspeed.models.families.values import ConfigValues

COUNT_KEYS = ("num_experts", "num_local_experts")  # published files have the first, newer ones the second


def shape(values: ConfigValues, name: str) -> ModelShape:
    """Read the dimensions of a Qwen3 with experts in every block."""
    if values.get("mlp_only_layers"):
        values.refuse(
            "mlp_only_layers",
            "these blocks have an MLP and the others experts, and FedSpeed trains models whose blocks have "
            "the same modules",
            "take a model with experts in every block",
        )
    if values.number("decoder_sparse_step", 1) != 1:
        values.refuse(
            "decoder_sparse_step",
            "only every so many blocks have experts, and FedSpeed trains models whose blocks have the same "
            "modules",
            "take a model with experts in every block",
        )
    if values.flag("output_router_logits", False):
        values.refuse(
            "output_router_logits",
            "transformers adds a loss of the router to that of the answers, and FedSpeed does not compute it",
            "set it to false: the router is frozen",
        )
    bias = values.flag("attention_bias", False)
    window = values.optional_number("sliding_window", 4096)
    windowed = values.layers() if values.flag("use_sliding_window", False) else 0
    dense = gated_shape(
        values,
        name,
        "qwen3_moe",
        kv_heads=4,
        attention_bias=bias,
        output_bias=bias,
        head_norms="each",
        window=window,
        windowed=windowed,
    )
    experts = _experts(values, dense.hidden)
    attention = tuple(linear for linear in dense.linears if linear.path.startswith("self_attn."))
    inner = experts.per_token * experts.inner
    return replace(dense, linears=attention, intermediate=inner, experts=experts)


def _experts(values: ConfigValues, hidden: int) -> Experts:
    key = next((key for key in COUNT_KEYS if values.get(key) is not None), COUNT_KEYS[0])
    count = values.number(key, 128)
    per_token = values.number("num_experts_per_tok", 8)
    if per_token > count:
        values.refuse(
            "num_experts_per_tok", f"a block has {count} experts ({key})", "correct one of the two numbers"
        )
    return Experts(count, per_token, hidden, values.number("moe_intermediate_size", 768))


def saved_bytes(shape: ModelShape, saved: SavedBytes) -> int:
    """Count the bytes that autograd saves of a block for each token.

    Besides those of attention and norms: of each of the token's experts gate and up in one tensor, the
    activated gate and the output, which the router's weight multiplies; that weight, once more in fp32, and
    four indices of 8 bytes that sort tokens by expert; and the router's probabilities in fp32.
    """
    experts = shape.experts
    assert experts is not None, "`shape` makes no model of this family without experts"
    norms = sum(4 * norm.elements for norm in shape.norms)
    query = shape.heads * shape.head_dim
    key = saved.kv_heads * shape.head_dim
    outputs = experts.per_token * experts.hidden
    attention = saved.type_bytes * (2 * query + 2 * key)
    inner = (3 + shape.activation_copies) * shape.intermediate
    computed = saved.type_bytes * (inner + outputs)
    chosen = (saved.type_bytes + 4 + 4 * 8) * experts.per_token
    return norms + attention + computed + chosen + 4 * experts.count


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    stacked=STACKED,
    shape=shape,
    saved_bytes_per_token=saved_bytes,
    masks="window",
)
