"""Where the decoder blocks of a causal LM are, whatever its family calls them."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

FINAL_NORM = {"llama": "norm", "qwen2": "norm", "gpt2": "ln_f"}


@dataclass(frozen=True)
class Anatomy:
    """The parts of a causal LM, under names that do not depend on its family.

    Attributes:
        decoder: takes token ids (or embeddings) through `blocks`, its list `blocks_name`, and the final norm.
    """

    decoder: nn.Module
    blocks_name: str
    blocks: nn.ModuleList
    embedding: nn.Embedding
    norm: nn.Module
    head: nn.Module


def anatomy(model: nn.Module) -> Anatomy:
    """The parts of a model of a supported family, with or without a PEFT adapter around it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = getattr(inner, inner.base_model_prefix)
    blocks = decoder_blocks(model)
    name = next(name for name, child in decoder.named_children() if child is blocks)
    return Anatomy(decoder, name, blocks, inner.get_input_embeddings(), getattr(decoder, FINAL_NORM[inner.config.model_type]),
                   inner.get_output_embeddings())


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks: the only ModuleList as long as `num_hidden_layers` says.

    Raises:
        ValueError: the model has none, or more than one candidate.
    """
    depth = model.config.num_hidden_layers
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__} has {len(found)} module lists of {depth} blocks, expected one")
    return found[0]


def trained_outside(model: nn.Module) -> str:
    """The name of a trainable parameter outside the decoder blocks, empty if there is none."""
    inside = {p for block in decoder_blocks(model) for p in block.parameters()}
    return next((name for name, p in model.named_parameters() if p.requires_grad and p not in inside), "")


def units(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Every parameter once, in pieces small enough to hold whole: (name, module, recurse).

    A decoder block is one piece; what lies outside the blocks (embedding, final norm, head) comes module by module, `recurse=False`.
    """
    blocks = set(decoder_blocks(model))
    inside = {m for block in blocks for m in block.modules()}
    for name, module in model.named_modules():
        if module in blocks:
            yield name, module, True
        elif module not in inside and next(module.parameters(recurse=False), None) is not None:
            yield name, module, False
