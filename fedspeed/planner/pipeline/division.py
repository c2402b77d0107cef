"""Where a model is cut for the ranks of a pipeline: by their arithmetic, and by what each stage keeps in
memory. Pure.

Links do not move a cut: an activation is as large behind one block as behind another. They count where the
    time of a whole step is asked for (`forecast`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from fedspeed.planner.memory import (
    DRIVER_BYTES,
    FRAGMENTATION,
    PROCESS_BYTES,
    head_bytes,
    saved_per_token,
    sizes,
    trainable_bytes,
    working_per_token,
)
from fedspeed.planner.plan import RankProfile, Setting, Task
from fedspeed.planner.timing import block_times_of
from fedspeed.schedule.schedules import SPARE


@dataclass(frozen=True)
class Traffic:
    """What goes through a pipeline in a step.

    Attributes:
        micro_batch: rows of each micro-batch. clients: whose adapters and optimizers every stage has.
        in_flight: by rank, micro-batches that are between its forward and its backward, at most.
        embeds, heads: by rank, the part of all micro-batches that it embeds, and whose labels it holds.
        recompute: whether blocks keep their inputs only and are computed again.
        slots: blocks that have their weights where a rank computes at a time; 0: all of its own.
    """

    micro_batch: int
    clients: int
    in_flight: tuple[int, ...]
    embeds: tuple[float, ...]
    heads: tuple[float, ...]
    recompute: bool
    slots: int = 0

    def tokens(self, task: Task) -> int:
        return self.micro_batch * task.tokens

    def setting(self) -> Setting:
        return Setting("stock", self.micro_batch, 1, checkpointing=self.recompute)


def client_traffic(ranks: int, micro_batch: int, micros: int, recompute: bool, clients: int = 1) -> Traffic:
    """1F1B over a client's ranks: the first one embeds, the last one has the labels. micros: of all clients
    that train at the same time.
    """
    last = ranks - 1
    return Traffic(
        micro_batch,
        clients,
        tuple(min(micros, ranks - rank) for rank in range(ranks)),
        embeds=tuple(float(rank == 0) for rank in range(ranks)),
        heads=tuple(float(rank == last) for rank in range(ranks)),
        recompute=recompute,
    )


def cluster_traffic(
    ranks: int, owners: Sequence[int], micro_batch: int, micros: int, recompute: bool
) -> Traffic:
    """A cluster's clients together. owners: the rank that embeds and has the labels, of each client. micros:
    of all of them.
    """
    shares = tuple(owners.count(rank) / len(owners) for rank in range(ranks))
    return Traffic(
        micro_batch,
        len(owners),
        tuple(min(micros, ranks - rank + SPARE) for rank in range(ranks)),
        embeds=shares,
        heads=shares,
        recompute=recompute,
    )


def divide(task: Task, profiles: Sequence[RankProfile], traffic: Traffic) -> tuple[int, ...] | None:
    """Cuts for ranks that form a pipeline in this order, as `boundaries` gives them."""
    setting = traffic.setting()
    block_times = [block_times_of(task, setting, profile) for profile in profiles]

    @cache
    def of(rank: int, blocks: int) -> float:
        if stage_bytes(task, profiles[rank], traffic, rank, blocks) > usable_bytes(profiles[rank]):
            return float("inf")
        times = block_times[rank]
        return blocks * (times.forward + times.recompute + times.gradients) + traffic.heads[rank] * times.head

    return boundaries(task.shape.layers, len(profiles), lambda rank, start, end: of(rank, end - start))


def usable_bytes(profile: RankProfile) -> int:
    """Bytes that a rank may take where it computes."""
    return profile.node.device.memory or profile.node.ram // profile.ranks_here


def stage_bytes(task: Task, profile: RankProfile, traffic: Traffic, rank: int, blocks: int) -> int:
    """Peak bytes where a rank with so many blocks computes: weights, what trains of them for every client,
    activations of the micro-batches under way and the buffers they come and go in, and the work of one block
    or of the head.
    """
    unit = sizes(task.shape, task.type_bytes)
    batch = traffic.tokens(task)
    hidden = batch * task.shape.hidden * task.type_bytes
    saved = batch * saved_per_token(task)
    weights = min(blocks, traffic.slots or blocks) * unit.block + unit.other
    weights += (unit.embedding if traffic.embeds[rank] else 0) + (
        unit.head or unit.embedding if traffic.heads[rank] else 0
    )
    trained = (
        sum(trainable_bytes(replace(task, stage=0), traffic.clients, profile).values())
        * blocks
        // task.shape.layers
    )
    block = batch * working_per_token(task) + (saved if traffic.recompute else 0)
    moving = traffic.in_flight[rank] * (blocks * (hidden if traffic.recompute else saved) + 2 * hidden)
    moving += max(block, head_bytes(task, batch, profile.node.device.kind) if traffic.heads[rank] else 0)
    if profile.node.device.kind == "cpu":
        return weights + trained + moving + PROCESS_BYTES["cpu"]
    return weights + trained + int((1 + FRAGMENTATION) * moving) + DRIVER_BYTES


def boundaries(blocks: int, ranks: int, seconds: Callable[[int, int, int], float]) -> tuple[int, ...] | None:
    """Cuts that make the slowest stage as fast as can be: stage i holds blocks [cuts[i], cuts[i + 1]); every
    stage holds at least one.

    Dynamic programming over (ranks used, blocks placed): the classic partition of a chain (Bokhari, 1988),
    exact, O(ranks * blocks^2).

    Args:
        seconds: of a rank, in the order of the pipeline, with the blocks [start, end); infinite if it cannot
            hold them, nor then any more than these.

    Returns:
        ranks + 1 cuts from 0 to `blocks`, or None if no division fits.
    """
    never = float("inf")
    slowest = [[never] * (blocks + 1) for _ in range(ranks + 1)]
    came_from = [[0] * (blocks + 1) for _ in range(ranks + 1)]
    slowest[0][0] = 0.0
    for rank in range(1, ranks + 1):
        for end in range(rank, blocks + 1):
            for start in range(end - 1, rank - 2, -1):
                own = seconds(rank - 1, start, end)
                if own == never:
                    break
                time = max(slowest[rank - 1][start], own)
                if time < slowest[rank][end]:
                    slowest[rank][end], came_from[rank][end] = time, start
    if slowest[ranks][blocks] == never:
        return None
    cuts = [blocks]
    for rank in range(ranks, 0, -1):
        cuts.append(came_from[rank][cuts[-1]])
    return tuple(reversed(cuts))
