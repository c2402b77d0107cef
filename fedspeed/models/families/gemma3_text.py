"""The text models of Gemma 3: embeddings scaled by the root of the hidden size, norms before and behind
attention and MLP and over each head of q and k, and sliding windows in most blocks.
"""

from typing import TYPE_CHECKING, Any

from fedspeed.models.families.base import Family, soft_capped
from fedspeed.models.families.gated import gated_saved_bytes, gated_shape
from fedspeed.models.families.shape import ModelShape
from fedspeed.models.families.values import ConfigValues

if TYPE_CHECKING:
    from torch import Tensor

NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def shape(values: ConfigValues, name: str) -> ModelShape:
    """Read the dimensions of a Gemma 3."""
    if values.flag("use_bidirectional_attention", False):
        values.refuse(
            "use_bidirectional_attention",
            "tokens of such a model attend to later ones, and FedSpeed trains causal models",
            "take a model without it",
        )
    if values.get("attn_logit_softcapping") is not None:
        values.refuse(
            "attn_logit_softcapping",
            "transformers does not cap the attention scores of this family",
            "set it to null if the model was trained without it",
        )
    # transformers demands it of this family, whatever head_dim says.
    values.check_heads(values.number("hidden_size"), values.number("num_attention_heads"))
    layers = values.layers()
    pattern = values.number("sliding_window_pattern", 6)
    bias = values.flag("attention_bias", False)
    return gated_shape(
        values,
        name,
        "gemma3_text",
        head_dim=256,
        kv_heads=4,
        tied=True,
        attention_bias=bias,
        output_bias=bias,
        norms=NORMS,
        head_norms="each",
        window=_window(values),
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        windowed=values.windowed_blocks(layers - layers // pattern),
        logits_copies=2 if values.get("final_logit_softcapping") is not None else 0,
    )


def _window(values: ConfigValues) -> int:
    """Read the length of the sliding window.

    Raises:
        ModelError: it is null, and blocks have one.
    """
    window = values.optional_number("sliding_window", 4096)
    if not window and values.windowed_blocks(1):
        values.refuse(
            "sliding_window",
            "blocks of type sliding_attention have no length of their window",
            "set it, or make all layer_types full_attention",
        )
    return window


def embed(rows: "Tensor", config: Any) -> "Tensor":
    """Scale embeddings as Gemma3TextScaledWordEmbedding does: by a factor rounded to the weights' type."""
    import torch

    return rows * torch.tensor(config.hidden_size**0.5).to(rows.dtype).item()


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    positions_are_scaled=True,
    shape=shape,
    saved_bytes_per_token=gated_saved_bytes,
    masks="layers",
    embed=embed,
    logits=soft_capped,
)
