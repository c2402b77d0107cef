"""Which unit of the base to load next, and which one to evict for it. Pure, so that the same sequence gives
the same loads on every rank.
"""

from collections.abc import Collection, Sequence

from fedspeed.schedule.instructions import Load, Loaded, Stream


def next_load(
    upcoming: Sequence[int], loaded: Collection[int], busy: Collection[int], slots: int
) -> tuple[int, int | None] | None:
    """Return (unit to load, unit to evict or None for a free slot), or None if nothing should be loaded now.

    Belady's rule (1966): the unit that is needed last is evicted. A training step passes the blocks forwards
    and then backwards, so that each direction begins with the blocks that the other one has left loaded: with
    S slots and N blocks a step loads 2 (N - S) blocks instead of 2 N.

    Args:
        upcoming: units in the order of their use from now on; a unit may occur several times.
        loaded: units that are loaded or being loaded.
        busy: those of them that are in use now.
    """
    wanted_at = next((i for i, unit in enumerate(upcoming) if unit not in loaded), None)
    if wanted_at is None:
        return None
    if len(loaded) < slots:
        return upcoming[wanted_at], None
    never = len(upcoming)
    first_use: dict[int, int] = {}
    for i, unit in enumerate(upcoming):
        first_use.setdefault(unit, i)
    use = {unit: first_use.get(unit, never) for unit in loaded if unit not in busy}
    evicted = max(use, key=lambda unit: (use[unit], unit), default=None)
    if evicted is None or use[evicted] <= wanted_at:
        return None
    return upcoming[wanted_at], evicted


def step_order(blocks: int, lowest: int = 0) -> list[int]:
    """Return the blocks in the order of a training step: forwards, then backwards down to the lowest block
    that trains. The last block occurs once, because its backward pass follows its forward pass at once.
    """
    return [*range(blocks), *range(blocks - 2, lowest - 1, -1)]


def loads_of(stream: Stream) -> list[Loaded]:
    """List the chunks and other units that a stream loads, in its order."""
    return [work.chunk for work in stream if isinstance(work, Load)]


def spread(blocks: int, count: int) -> list[int]:
    """Choose `count` resident blocks, evenly over the depth, so that the loads of the others are hidden
    behind the arithmetic between them.
    """
    return [i * blocks // count for i in range(count)]
