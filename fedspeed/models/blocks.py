"""Where the decoder blocks of a causal LM are, whatever its family calls them."""

from collections.abc import Iterator

from torch import nn


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
