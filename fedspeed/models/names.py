"""What the parameters of a model are called, and their shapes, from its dimensions alone. Tests hold them
against transformers' models.
"""

from collections.abc import Iterator

from fedspeed.models.catalogue import Linear, ModelShape

Shape = tuple[int, ...]
HEAD = "lm_head.weight"
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


def embedding_name(family: str) -> str:
    return "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"


def decoder_prefix(family: str) -> str:
    """What stands before the names of the decoder's parameters, and is left out in some files."""
    return "transformer." if family == "gpt2" else "model."


def parameters(shape: ModelShape) -> dict[str, Shape]:
    """Every parameter of a model once, by its name; a tied head is the embedding, and has no name of its
    own.
    """
    found = dict(_gpt2(shape) if shape.family == "gpt2" else _llama(shape))
    if not shape.tied:
        found[HEAD] = (shape.vocab, shape.hidden)
    return found


def _llama(shape: ModelShape) -> Iterator[tuple[str, Shape]]:
    """Llama and Qwen2, whose matrices are stored [out, in]."""
    yield embedding_name(shape.family), (shape.vocab, shape.hidden)
    for block in range(shape.layers):
        at = f"model.layers.{block}."
        for linear in shape.linears:
            part = "self_attn" if linear.name in ATTENTION else "mlp"
            yield from _linear(f"{at}{part}.{linear.name}", linear, (linear.rows_out, linear.rows_in))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}{norm}.weight", (shape.hidden,)
    yield "model.norm.weight", (shape.hidden,)


def _gpt2(shape: ModelShape) -> Iterator[tuple[str, Shape]]:
    """GPT-2, whose matrices are stored [in, out], two of them under the same name in attention and MLP."""
    yield embedding_name(shape.family), (shape.vocab, shape.hidden)
    yield "transformer.wpe.weight", (shape.positions, shape.hidden)
    for block in range(shape.layers):
        at = f"transformer.h.{block}."
        for part, linear in zip(("attn", "attn", "mlp", "mlp"), shape.linears, strict=True):
            yield from _linear(f"{at}{part}.{linear.name}", linear, (linear.rows_in, linear.rows_out))
        for norm in ("ln_1", "ln_2"):
            yield from _layer_norm(f"{at}{norm}", shape.hidden)
    yield from _layer_norm("transformer.ln_f", shape.hidden)


def _linear(name: str, linear: Linear, matrix: Shape) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", matrix
    if linear.bias:
        yield f"{name}.bias", (linear.rows_out,)


def _layer_norm(name: str, size: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (size,)
    yield f"{name}.bias", (size,)
