"""FedBiOT's arrays: the server's engine has LoRA factors on the emulator's blocks and on the adapter's, and
clients have them on the adapter's only. In the state the emulator's factors are arrays of the folded adapter
(models.folded), which clients compute with and nobody else trains: B is LEFT, and A is RIGHT.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from fedspeed.models.factors import pairs
from fedspeed.models.folded import LEFT, RIGHT, folded_name, module_of, named

Arrays = dict[str, np.ndarray]
_NUMBER = re.compile(r"\.(\d+)\.")  # of the block, the first one in a parameter's name


def block_of(name: str) -> int:
    """Return the number of the decoder block that a parameter is in."""
    found = _NUMBER.search(name)
    assert found is not None, f"{name} is in no block"
    return int(found[1])


def blocks_of(names: Iterable[str], adapter_blocks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (blocks of the emulator, blocks of the adapter) of the server's engine.

    Args:
        names: of its trainable arrays. adapter_blocks: number of the adapter's blocks, the last ones.
    """
    numbers = tuple(sorted({block_of(name) for name in names}))
    return numbers[:-adapter_blocks], numbers[-adapter_blocks:]


def to_state(arrays: Mapping[str, np.ndarray], adapter_blocks: int) -> Arrays:
    """Return the arrays of the server's engine by their names in the state."""
    emulator, _ = blocks_of(arrays, adapter_blocks)
    state = dict(arrays)
    for a, b in pairs(arrays):
        if block_of(a) in emulator:
            state |= named(module_of(a), {LEFT: state.pop(b), RIGHT: state.pop(a)})
    return state


def from_state(state: Mapping[str, np.ndarray], names: Iterable[str]) -> Arrays:
    """Return the arrays of the server's engine, given a state.

    Args:
        names: of its trainable arrays.
    """
    found = {}
    for a, b in pairs(names):
        module = module_of(a)
        for name, kind in ((a, RIGHT), (b, LEFT)):
            folded = folded_name(module, kind)
            found[name] = state[folded if folded in state else name]
    return found
