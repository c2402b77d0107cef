"""Find the decoder blocks of a causal LM and what surrounds them, whatever its family calls them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from fedspeed.models.families.base import Family
from fedspeed.models.families.registry import FAMILIES

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Lists of a configuration with an entry for each decoder block, by its number.
PER_BLOCK = ("layer_types", "no_rope_layers")


@dataclass(frozen=True)
class Anatomy:
    """The parts of a causal LM, under names that do not depend on its family.

    Attributes:
        family: what FedSpeed knows of the model's family.
        decoder: takes token ids (or embeddings) through `blocks`, its list `blocks_name`, and the final norm.
    """

    family: Family
    decoder: "PreTrainedModel"
    blocks_name: str
    blocks: nn.ModuleList
    embedding: nn.Embedding
    norm: nn.Module
    head: nn.Linear


def anatomy(model: "PreTrainedModel") -> Anatomy:
    """Find the parts of a model of a supported family, with or without a PEFT adapter around it."""
    inner = _without_adapter(model)
    family = FAMILIES[inner.config.model_type]
    decoder = getattr(inner, inner.base_model_prefix)
    name, blocks = _named_blocks(inner)
    return Anatomy(
        family=family,
        decoder=decoder,
        blocks_name=name,
        blocks=blocks,
        embedding=inner.get_input_embeddings(),
        norm=getattr(decoder, family.final_norm),
        head=inner.get_output_embeddings(),
    )


def decoder_blocks(model: "PreTrainedModel") -> nn.ModuleList:
    """Return the list of a model's decoder blocks: the only module list that its decoder has.

    Raises:
        ValueError: the decoder has none, or more than one, or one of another length than the configuration
            says.
    """
    return _named_blocks(_without_adapter(model))[1]


def _without_adapter(model: "PreTrainedModel") -> "PreTrainedModel":
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _named_blocks(inner: "PreTrainedModel") -> tuple[str, nn.ModuleList]:
    """Return the decoder's list of blocks with the name that it has there."""
    decoder = getattr(inner, inner.base_model_prefix)
    lists = [(name, child) for name, child in decoder.named_children() if isinstance(child, nn.ModuleList)]
    depth = inner.config.num_hidden_layers
    if len(lists) != 1 or len(lists[0][1]) != depth:
        lengths = ", ".join(str(len(child)) for _, child in lists) or "none"
        raise ValueError(
            f"{type(decoder).__name__} has module lists of these lengths: {lengths}; expected one of {depth} "
            "blocks"
        )
    return lists[0]


class KeptBlocks(nn.ModuleList):
    """Some decoder blocks of a model: indexed by their positions among these, named by their numbers in the
    whole model.
    """

    def __init__(self, numbered: Mapping[int, nn.Module]):
        super().__init__()
        for number, block in numbered.items():
            self.add_module(str(number), block)

    def __getitem__(self, at: int | slice) -> Any:
        return list(self._modules.values())[at]


def keep_blocks(model: "PreTrainedModel", numbers: Sequence[int]) -> None:
    """Remove all decoder blocks of a model but some; parameters keep the names that they have in the whole
    model.

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
    for position, number in enumerate(numbers):
        for module in parts.blocks[number].modules():
            if hasattr(module, "layer_idx"):  # by which a cache of keys and values knows the block
                setattr(module, "layer_idx", position)
    configs: list[PretrainedConfig] = [model.config, parts.decoder.config]
    for config in {id(config): config for config in configs}.values():
        config.num_hidden_layers = len(numbers)
        for name in PER_BLOCK:
            if entries := getattr(config, name, None):
                setattr(config, name, [entries[b] for b in numbers])


def trained_outside(model: "PreTrainedModel") -> str:
    """Return the name of a trainable parameter outside the decoder blocks, empty if there is none."""
    inside = {p for block in decoder_blocks(model) for p in block.parameters()}
    return next((name for name, p in model.named_parameters() if p.requires_grad and p not in inside), "")


def units(model: "PreTrainedModel") -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield modules that together own every parameter once, each small enough to be held whole in memory:
    (name, module, recurse).

    A decoder block is one unit. What lies outside the blocks (embedding, final norm, head) comes module by
    module, `recurse=False`: only the parameters that the module owns itself.
    """
    blocks = set(decoder_blocks(model))
    inside = {m for block in blocks for m in block.modules()}
    for name, module in model.named_modules():
        if module in blocks:
            yield name, module, True
        elif module not in inside and next(module.parameters(recurse=False), None) is not None:
            yield name, module, False
