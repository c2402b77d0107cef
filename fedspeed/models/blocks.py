"""Where the decoder blocks of a causal LM are, whatever its family calls them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from fedspeed.models.families.base import Family
from fedspeed.models.families.registry import FAMILIES


@dataclass(frozen=True)
class Anatomy:
    """The parts of a causal LM, under names that do not depend on its family.

    Attributes:
        family: what FedSpeed knows of the model's family.
        decoder: takes token ids (or embeddings) through `blocks`, its list `blocks_name`, and the final norm.
    """

    family: Family
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
    family = FAMILIES[inner.config.model_type]
    return Anatomy(
        family=family,
        decoder=decoder,
        blocks_name=name,
        blocks=blocks,
        embedding=inner.get_input_embeddings(),
        norm=getattr(decoder, family.final_norm),
        head=inner.get_output_embeddings(),
    )


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks: the only ModuleList as long as `num_hidden_layers` says.

    Raises:
        ValueError: the model has none, or more than one candidate.
    """
    depth = model.config.num_hidden_layers
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} module lists of {depth} blocks, expected one"
        )
    return found[0]


class KeptBlocks(nn.ModuleList):
    """Some decoder blocks of a model: indexed by their places among these, called by their numbers in the
    whole model.
    """

    def __init__(self, numbered: Mapping[int, nn.Module]):
        super().__init__()
        for number, block in numbered.items():
            self.add_module(str(number), block)

    def __getitem__(self, at: int | slice) -> nn.Module | list[nn.Module]:
        return list(self._modules.values())[at]


def keep_blocks(model: nn.Module, numbers: Sequence[int]) -> None:
    """Leave only some decoder blocks in a model; parameters keep the names that they have in the whole one.

    Args:
        numbers: of the blocks that stay, in ascending order.

    Raises:
        ValueError: there is no such block, none stays, or they do not ascend.
    """
    parts = anatomy(model)
    depth = len(parts.blocks)
    if not numbers or list(numbers) != sorted(set(numbers)) or not 0 <= numbers[0] <= numbers[-1] < depth:
        raise ValueError(
            f"blocks {list(numbers)}: name some of the model's {depth}, from 0 on, each once and in "
            "ascending order"
        )
    setattr(parts.decoder, parts.blocks_name, KeptBlocks({b: parts.blocks[b] for b in numbers}))
    for place, number in enumerate(numbers):
        for module in parts.blocks[number].modules():
            if hasattr(module, "layer_idx"):  # where a cache keeps its keys and values
                module.layer_idx = place
    for config in {id(config): config for config in (model.config, parts.decoder.config)}.values():
        config.num_hidden_layers = len(numbers)
        if getattr(config, "layer_types", None):  # by the place in the list
            config.layer_types = [config.layer_types[b] for b in numbers]


def trained_outside(model: nn.Module) -> str:
    """The name of a trainable parameter outside the decoder blocks, empty if there is none."""
    inside = {p for block in decoder_blocks(model) for p in block.parameters()}
    return next((name for name, p in model.named_parameters() if p.requires_grad and p not in inside), "")


def units(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Every parameter once, in pieces small enough to hold whole: (name, module, recurse).

    A decoder block is one piece; what lies outside the blocks (embedding, final norm, head) comes module by
    module, `recurse=False`.
    """
    blocks = set(decoder_blocks(model))
    inside = {m for block in blocks for m in block.modules()}
    for name, module in model.named_modules():
        if module in blocks:
            yield name, module, True
        elif module not in inside and next(module.parameters(recurse=False), None) is not None:
            yield name, module, False
