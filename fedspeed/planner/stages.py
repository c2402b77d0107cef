"""Where to cut a model into consecutive stages for a client's unequal ranks. Pure."""

from collections.abc import Sequence
from itertools import accumulate

from fedspeed.planner.memory import sizes
from fedspeed.planner.plan import Place, Task


def cut(task: Task, places: Sequence[Place]) -> tuple[int, ...] | None:
    """Cuts of a task's blocks for ranks that form a pipeline in this order: by their arithmetic and memory; the head is the last one's work.

    Returns:
        as `boundaries`.
    """
    shape, unit = task.shape, sizes(task.shape, task.type_bytes)
    head = shape.embedding * task.answer_share
    costs = [float(shape.block)] * shape.layers
    costs[-1] += head
    held = [unit.block] * shape.layers
    held[0], held[-1] = held[0] + unit.embedding, held[-1] + unit.head
    caps = [place.node.device.memory or place.node.ram // place.ranks_here for place in places]
    return boundaries(costs, [place.node.device.flops[task.dtype] for place in places], held, caps)


def boundaries(costs: Sequence[float], speeds: Sequence[float], sizes: Sequence[int] = (), caps: Sequence[int] = ()) -> tuple[int, ...] | None:
    """Cuts that make the slowest stage as fast as can be: stage i holds blocks [cuts[i], cuts[i + 1]); every stage holds at least one.

    Dynamic programming over (ranks used, blocks placed): the classic partition of a chain (Bokhari, 1988), exact, O(ranks * blocks^2).

    Args:
        costs: work of each block, for instance FLOP; the first and last may include embedding and head.
        speeds: of each rank in the order of the pipeline, in work per second.
        sizes, caps: bytes of each block and what each rank may hold; empty: memory does not matter.

    Returns:
        len(speeds) + 1 cuts from 0 to len(costs), or None if no division fits.
    """
    blocks, ranks = len(costs), len(speeds)
    sizes, caps = sizes or [0] * blocks, caps or [0] * ranks
    work, held = [0, *accumulate(costs)], [0, *accumulate(sizes)]
    never = float("inf")
    slowest = [[never] * (blocks + 1) for _ in range(ranks + 1)]
    came_from = [[0] * (blocks + 1) for _ in range(ranks + 1)]
    slowest[0][0] = 0.0
    for rank in range(1, ranks + 1):
        for end in range(rank, blocks + 1):
            for start in range(end - 1, rank - 2, -1):
                if held[end] - held[start] > caps[rank - 1]:
                    break
                time = max(slowest[rank - 1][start], (work[end] - work[start]) / speeds[rank - 1])
                if time < slowest[rank][end]:
                    slowest[rank][end], came_from[rank][end] = time, start
    if slowest[ranks][blocks] == never:
        return None
    cuts = [blocks]
    for rank in range(ranks, 0, -1):
        cuts.append(came_from[rank][cuts[-1]])
    return tuple(reversed(cuts))
