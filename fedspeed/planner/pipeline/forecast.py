"""Memory and time of a pipeline on given machines: its instruction streams, executed against the planner's
model of time. Pure.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fedspeed.planner.memory import PROCESS_BYTES, sizes
from fedspeed.planner.pipeline.division import (
    Traffic,
    client_traffic,
    cluster_traffic,
    divide,
    stage_bytes,
    usable_bytes,
)
from fedspeed.planner.pipeline.execute import execute
from fedspeed.planner.pipeline.times import PipelineTimes
from fedspeed.planner.plan import RankProfile, Setting, Task
from fedspeed.planner.timing import block_times_of, load_s, seconds_of
from fedspeed.schedule.instructions import Micro, Stream
from fedspeed.schedule.layout import Layout, interleaved, stages
from fedspeed.schedule.schedules import one_f_one_b, shared, streamed, taking_turns

LATENCY_S = 2e-4  # that every transfer takes in addition
# Micro-batches of all clients for which a schedule is made. A longer step is taken to be a multiple of that
# one, which overestimates its bubble slightly.
MAX_MICROS = 64
SLOTS = 2  # chunks of one block each, if chunks are loaded


@dataclass(frozen=True)
class PipelineForecast:
    """The predicted cost of one optimizer step of every client of a pipeline.

    Attributes:
        chunks: number of blocks of each chunk, in the model's order; chunks are assigned to the ranks in
            turn. device: peak bytes of the fullest device; 0 if ranks compute in RAM. ram: peak bytes of the
            fullest node's RAM. seconds: of the step. bubble: share of the ranks' time in which they do not
            compute. recompute: whether blocks are recomputed. loads: whether chunks are loaded from host
            memory.
    """

    chunks: tuple[int, ...]
    device: int
    ram: int
    seconds: float
    bubble: float
    recompute: bool
    loads: bool


def client_pipeline(
    task: Task, profiles: Sequence[RankProfile], clients: int, micro_batch: int, micros: int
) -> PipelineForecast | None:
    """Predict a pipeline of some clients over their ranks.

    Args:
        micros: micro-batches of each client.

    Returns:
        The fastest of three executions: all weights resident, with or without recomputing blocks, and chunks
        that are loaded. None if none fits.
    """
    scheduled = min(micros, -(-MAX_MICROS // clients))
    ranks = len(profiles)
    turns = [client for client, _ in taking_turns([scheduled] * clients)]
    found = [
        _resident(
            task,
            profiles,
            client_traffic(ranks, micro_batch, micros * clients, recompute, clients),
            one_f_one_b(ranks, turns),
            micros / scheduled,
        )
        for recompute in (False, True)
    ]
    layout = interleaved(task.shape.layers, ranks, SLOTS // 2)
    traffic = replace(
        client_traffic(ranks, micro_batch, micros * clients, True, clients),
        in_flight=(micros * clients,) * ranks,
        slots=SLOTS,
    )
    found.append(
        _loaded(
            task,
            profiles,
            traffic,
            layout=layout,
            streams=streamed(ranks, len(layout.chunks), turns),
            repeats=micros / scheduled,
        )
    )
    return min(filter(None, found), key=lambda one: one.seconds, default=None)


def cluster_pipeline(
    task: Task, profiles: Sequence[RankProfile], owners: Sequence[int], micro_batch: int, micros: int
) -> PipelineForecast | None:
    """Predict a pipeline of all clients of a cluster over all its ranks, with all weights resident.

    Args:
        owners: by client, the rank that embeds its micro-batches and has their labels.
        micros: micro-batches of each client.

    Returns:
        The faster of recomputing blocks or not; None if neither fits.
    """
    scheduled = min(micros, -(-MAX_MICROS // len(owners)))
    ranks = len(profiles)
    streams = shared(
        [Micro(c, owners[c], owners[c]) for c, _ in taking_turns([scheduled] * len(owners))], ranks
    )
    found = [
        _resident(
            task,
            profiles,
            cluster_traffic(ranks, owners, micro_batch, micros * len(owners), recompute),
            streams,
            micros / scheduled,
        )
        for recompute in (False, True)
    ]
    return min(filter(None, found), key=lambda one: one.seconds, default=None)


def _resident(
    task: Task, profiles: Sequence[RankProfile], traffic: Traffic, streams: Sequence[Stream], repeats: float
) -> PipelineForecast | None:
    cuts = divide(task, profiles, traffic)
    if cuts is None:
        return None
    return _executed(task, profiles, traffic, layout=stages(cuts), streams=streams, repeats=repeats, loads=())


def _loaded(
    task: Task,
    profiles: Sequence[RankProfile],
    traffic: Traffic,
    layout: Layout,
    streams: Sequence[Stream],
    *,
    repeats: float,
) -> PipelineForecast | None:
    setting = Setting("ram", traffic.micro_batch, 1)
    block = sizes(task.shape, task.type_bytes).block
    loads = [
        load_s(len(chunk) * block, setting, profiles[holder])
        for chunk, holder in zip(layout.chunks, layout.holders)
    ]
    return _executed(task, profiles, traffic, layout=layout, streams=streams, repeats=repeats, loads=loads)


def _executed(
    task: Task,
    profiles: Sequence[RankProfile],
    traffic: Traffic,
    layout: Layout,
    streams: Sequence[Stream],
    *,
    repeats: float,
    loads: Sequence[float],
) -> PipelineForecast | None:
    blocks = [len(layout.blocks_of(rank)) for rank in range(len(profiles))]
    memory = tuple(
        stage_bytes(task, profile, traffic, rank, count)
        for rank, (profile, count) in enumerate(zip(profiles, blocks))
    )
    ram = {host: 0 for host in _hosts(profiles)}
    for host, profile, count, nbytes in zip(_hosts(profiles), profiles, blocks, memory):
        process = PROCESS_BYTES["gpu"] if profile.node.device.kind == "gpu" else nbytes
        ram[host] += process + (count * sizes(task.shape, task.type_bytes).block if loads else 0)
    if any(nbytes > usable_bytes(profile) for nbytes, profile in zip(memory, profiles)) or any(
        ram[host] > profile.node.ram for host, profile in zip(_hosts(profiles), profiles)
    ):
        return None
    # The number of loads does not grow with that of micro-batches. If the schedule is shortened, so are the
    # loads, and the whole step is scaled up afterwards.
    timeline = execute(streams, times_of(task, traffic, profiles, layout, [load / repeats for load in loads]))
    device = max(
        nbytes if profile.node.device.kind == "gpu" else 0 for nbytes, profile in zip(memory, profiles)
    )
    return PipelineForecast(
        tuple(map(len, layout.chunks)),
        device,
        max(ram.values()),
        seconds=timeline.seconds * repeats,
        bubble=timeline.bubble,
        recompute=traffic.recompute,
        loads=bool(loads),
    )


def times_of(
    task: Task, traffic: Traffic, profiles: Sequence[RankProfile], layout: Layout, loads: Sequence[float] = ()
) -> PipelineTimes:
    """Return the seconds of the instructions of one micro-batch."""
    setting = traffic.setting()
    block_times = [block_times_of(task, setting, profile) for profile in profiles]
    forward = [
        block_times[holder].forward * len(chunk) for chunk, holder in zip(layout.chunks, layout.holders)
    ]
    backward = [
        (block_times[holder].recompute + block_times[holder].gradients) * len(chunk)
        for chunk, holder in zip(layout.chunks, layout.holders)
    ]
    steps = [
        seconds_of(task, setting, profile).causes["optimizer"]
        * len(layout.blocks_of(rank))
        / task.shape.layers
        for rank, profile in enumerate(profiles)
    ]
    hosts = list(_hosts(profiles))
    return PipelineTimes(
        forward,
        backward,
        [times.head for times in block_times],
        steps=steps,
        embeds=[0.0] * len(profiles),
        nbytes=traffic.tokens(task) * task.shape.hidden * task.type_bytes,
        hosts=hosts,
        rates={host: profile.node.link_rate for host, profile in zip(hosts, profiles)},
        local_rate=min(profile.node.local_rate for profile in profiles),
        latency=LATENCY_S,
        loads=loads,
    )


def _hosts(profiles: Sequence[RankProfile]) -> Iterator[str]:
    """Yield a name for each rank's host; the ranks of a host are consecutive."""
    first = 0
    while first < len(profiles):
        here = min(profiles[first].ranks_here, len(profiles) - first)
        yield from [f"host {first}"] * here
        first += here
