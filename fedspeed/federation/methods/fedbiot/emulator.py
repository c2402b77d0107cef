"""Which blocks of a model are FedBiOT's adapter, and which of the others its emulator keeps."""

from dataclasses import dataclass

from fedspeed.errors import ModelError


@dataclass(frozen=True)
class Division:
    """The blocks of a model by their part in the method.

    Attributes:
        emulator: numbers of the blocks that the emulator keeps, ascending. adapter: of the last blocks.
        layers: number of all blocks.
    """

    emulator: tuple[int, ...]
    adapter: tuple[int, ...]
    layers: int

    @property
    def kept(self) -> tuple[int, ...]:
        """The blocks that a client builds: the emulator's, then the adapter's."""
        return (*self.emulator, *self.adapter)


def emulator_blocks(blocks: int, dropped: float) -> tuple[int, ...]:
    """Return the blocks that an emulator keeps: n = round(blocks * (1 - dropped)) of them, spread evenly from
    the first to the last, with number floor(i (blocks - 1) / (n - 1)) at position i; the first one where
    n = 1. A half is rounded to the even number, as Python rounds.

    Args:
        blocks: number of blocks that the emulator stands for, at least 1. dropped: share that it drops.
    """
    kept = round(blocks * (1 - dropped))
    if kept <= 1:
        return (0,) * kept
    return tuple(i * (blocks - 1) // (kept - 1) for i in range(kept))


def divide(layers: int, *, adapter_blocks: int, dropped: float) -> Division:
    """Divide a model's blocks into the adapter, its last `adapter_blocks` blocks, and the emulator of the
    others.

    Raises:
        ModelError: the model has too few blocks.
    """
    others = layers - adapter_blocks
    setting = f"federation.method.adapter_blocks={adapter_blocks}"
    if others < 1:
        raise ModelError(
            f"{setting}: the base has {layers} blocks, and the emulator needs at least one before the "
            f"adapter's; choose at most {layers - 1}"
        )
    emulator = emulator_blocks(others, dropped)
    if not emulator:
        raise ModelError(
            f"federation.method.dropped={dropped:g} leaves none of the {others} blocks before the adapter's "
            f"({setting}); choose less than {1 - 0.5 / others:.4g}"
        )
    return Division(emulator, tuple(range(others, layers)), layers)
