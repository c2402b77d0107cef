"""Where a model is cut for the ranks of a pipeline, by their speed and their memory. Pure.

Links do not influence the cuts, because an activation is equally large behind every block. They count in the
time of a whole step (`forecast`).
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
    """The micro-batches that go through a pipeline in a step.

    Attributes:
        micro_batch: rows of each micro-batch.
        clients: number of clients, for each of which every stage has an adapter and an optimizer.
        in_flight: by rank, the largest number of micro-batches between its forward and backward pass.
        embeds: by rank, the share of all micro-batches that it embeds.
        heads: by rank, the share of all micro-batches whose labels it has.
        recompute: whether blocks keep only their inputs and are recomputed.
        slots: blocks whose weights are on the device at the same time; 0: all of the rank's blocks.
    """

    micro_batch: int
    clients: int
    in_flight: tuple[int, ...]
    embeds: tuple[float, ...]
    heads: tuple[float, ...]
    recompute: bool
    slots: int = 0

    def tokens(self, task: Task) -> int:
        """Return the tokens of a micro-batch."""
        return self.micro_batch * task.tokens

    def setting(self) -> Setting:
        """Return the setting that the time model needs for a micro-batch."""
        return Setting("stock", self.micro_batch, 1, checkpointing=self.recompute)


def client_traffic(ranks: int, micro_batch: int, micros: int, recompute: bool, clients: int = 1) -> Traffic:
    """Return the traffic of 1F1B over a client's ranks: the first one embeds, the last one has the labels.

    Args:
        micros: number of micro-batches of all clients that train at the same time.
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
    """Return the traffic of all clients of a cluster in one pipeline.

    Args:
        owners: by client, the rank that embeds its micro-batches and has their labels.
        micros: number of micro-batches of all clients.
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
    """Return the cuts for ranks that form a pipeline in this order, or None if no division fits (see
    `boundaries`).
    """
    setting = traffic.setting()
    block_times = [block_times_of(task, setting, profile) for profile in profiles]

    @cache
    def seconds(rank: int, blocks: int) -> float:
        if stage_bytes(task, profiles[rank], traffic, rank, blocks) > usable_bytes(profiles[rank]):
            return float("inf")
        times = block_times[rank]
        return blocks * (times.forward + times.recompute + times.gradients) + traffic.heads[rank] * times.head

    return boundaries(task.shape.layers, len(profiles), lambda rank, start, end: seconds(rank, end - start))


def usable_bytes(profile: RankProfile) -> int:
    """Return the bytes that a rank may use of the memory that it computes in."""
    return profile.node.device.memory or profile.node.ram // profile.ranks_here


def stage_bytes(task: Task, profile: RankProfile, traffic: Traffic, rank: int, blocks: int) -> int:
    """Return the peak bytes of a rank with so many blocks, in the memory that it computes in.

    They are those of the weights, of every client's trainable parameters in these blocks, of the activations
    of the micro-batches in flight with their transfer buffers, and of computing one block or the head.
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
        sum(
            trainable_bytes(
                replace(task, stage=0), traffic.clients, client_ranks=profile.client_ranks
            ).values()
        )
        * blocks
        // task.shape.layers
    )
    block = batch * working_per_token(task) + (saved if traffic.recompute else 0)
    transient = traffic.in_flight[rank] * (blocks * (hidden if traffic.recompute else saved) + 2 * hidden)
    transient += max(block, head_bytes(task, batch, profile.node.device.kind) if traffic.heads[rank] else 0)
    if profile.node.device.kind == "cpu":
        return weights + trained + transient + PROCESS_BYTES["cpu"]
    return weights + trained + int((1 + FRAGMENTATION) * transient) + DRIVER_BYTES


def boundaries(blocks: int, ranks: int, seconds: Callable[[int, int, int], float]) -> tuple[int, ...] | None:
    """Return the cuts that make the slowest stage as fast as possible.

    Stage i has the blocks [cuts[i], cuts[i + 1]), at least one. Dynamic programming over (ranks used, blocks
    assigned): the classic partition of a chain (Bokhari, 1988), exact, O(ranks * blocks^2).

    Args:
        seconds: seconds(rank, start, end) of a rank, in the order of the pipeline, with the blocks [start,
            end); infinite if these do not fit, and then also for more blocks.

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
                stage = seconds(rank - 1, start, end)
                if stage == never:
                    break
                time = max(slowest[rank - 1][start], stage)
                if time < slowest[rank][end]:
                    slowest[rank][end] = time
                    came_from[rank][end] = start
    if slowest[ranks][blocks] == never:
        return None
    cuts = [blocks]
    for rank in range(ranks, 0, -1):
        cuts.append(came_from[rank][cuts[-1]])
    return tuple(reversed(cuts))
