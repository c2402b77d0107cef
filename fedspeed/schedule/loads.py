"""Which unit to load next, and into whose place. Pure: the same sequence gives the same loads on every
rank.
"""

from collections.abc import Collection, Sequence

from fedspeed.schedule.instructions import Load, Loaded, Stream


def next_load(
    upcoming: Sequence[int], held: Collection[int], busy: Collection[int], slots: int
) -> tuple[int, int | None] | None:
    """(unit to load, unit whose slot it takes or None for a free slot), or None while nothing should be
    loaded.

    Belady's rule (1966): the unit that is needed last goes. A training step visits the blocks forwards and
    then backwards, so what is held
    at a turn is what the other direction begins with: with S slots and N blocks a step loads 2 (N - S) blocks
        instead of 2 N.

    Args:
        upcoming: units in the order of their use from now on; one may come more than once.
        held: units that are loaded or being loaded. busy: those of them that are in use now.
    """
    wanted_at = next((i for i, unit in enumerate(upcoming) if unit not in held), None)
    if wanted_at is None:
        return None
    if len(held) < slots:
        return upcoming[wanted_at], None
    never = len(upcoming)
    first_use: dict[int, int] = {}
    for i, unit in enumerate(upcoming):
        first_use.setdefault(unit, i)
    use = {unit: first_use.get(unit, never) for unit in held if unit not in busy}
    victim = max(use, key=lambda unit: (use[unit], unit), default=None)
    if victim is None or use[victim] <= wanted_at:
        return None
    return upcoming[wanted_at], victim


def step_order(blocks: int, lowest: int = 0) -> list[int]:
    """Blocks in the order in which a training step visits them: forwards, then backwards down to the lowest
    one that trains. The last one is visited once: its backward follows its forward.
    """
    return [*range(blocks), *range(blocks - 2, lowest - 1, -1)]


def loads_of(stream: Stream) -> list[Loaded]:
    """List what a stream loads, in its order."""
    return [work.chunk for work in stream if isinstance(work, Load)]


def spread(blocks: int, count: int) -> list[int]:
    """Choose `count` of the blocks that live on the device for good, evenly over the depth, so that loads
    find arithmetic between them to hide behind.
    """
    return [i * blocks // count for i in range(count)]
