"""What a pipeline costs on given machines: its instruction streams, executed against the planner's model of
time. Pure.
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

LATENCY_S = 2e-4  # of a transfer, whatever its size
# of all clients, for which a schedule is made; a step of more takes as many times longer, which overstates
# the bubble by little
MAX_MICROS = 64
SLOTS = 2  # chunks of one block each, where chunks are loaded


@dataclass(frozen=True)
class PipelineForecast:
    """Of one optimizer step of every client of a pipeline.

    Attributes:
        chunks: blocks of each, in the model's order, dealt to the ranks in turn.
        device, ram: peak bytes of the fullest device, 0 where ranks compute in RAM, and of the fullest node.
        seconds: of the step. bubble: part of the ranks' time in which they do not compute.
        recompute: whether blocks are computed again. loads: whether chunks come from host memory.
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
    """The clients of some ranks over these, with `micros` micro-batches each: the fastest of all weights
    resident, with blocks computed again or not, and
    chunks that are loaded. None: none fits.
    """
    made = min(micros, -(-MAX_MICROS // clients))
    ranks = len(profiles)
    turns = [client for client, _ in taking_turns([made] * clients)]
    found = [
        _resident(
            task,
            profiles,
            client_traffic(ranks, micro_batch, micros * clients, recompute, clients),
            one_f_one_b(ranks, turns),
            micros / made,
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
            times=micros / made,
        )
    )
    return min(filter(None, found), key=lambda one: one.seconds, default=None)


def cluster_pipeline(
    task: Task, profiles: Sequence[RankProfile], owners: Sequence[int], micro_batch: int, micros: int
) -> PipelineForecast | None:
    """All clients of a cluster over all its ranks, with `micros` micro-batches each. owners: the rank that
    embeds and has the labels, of each client.
    """
    made = min(micros, -(-MAX_MICROS // len(owners)))
    ranks = len(profiles)
    streams = shared([Micro(c, owners[c], owners[c]) for c, _ in taking_turns([made] * len(owners))], ranks)
    found = [
        _resident(
            task,
            profiles,
            cluster_traffic(ranks, owners, micro_batch, micros * len(owners), recompute),
            streams,
            micros / made,
        )
        for recompute in (False, True)
    ]
    return min(filter(None, found), key=lambda one: one.seconds, default=None)


def _resident(
    task: Task, profiles: Sequence[RankProfile], traffic: Traffic, streams: Sequence[Stream], times: float
) -> PipelineForecast | None:
    cuts = divide(task, profiles, traffic)
    return cuts and _executed(
        task, profiles, traffic, layout=stages(cuts), streams=streams, times=times, loads=()
    )


def _loaded(
    task: Task,
    profiles: Sequence[RankProfile],
    traffic: Traffic,
    layout: Layout,
    streams: Sequence[Stream],
    *,
    times: float,
) -> PipelineForecast | None:
    setting = Setting("ram", traffic.micro_batch, 1)
    block = sizes(task.shape, task.type_bytes).block
    loads = [
        load_s(len(chunk) * block, setting, profiles[holder])
        for chunk, holder in zip(layout.chunks, layout.holders)
    ]
    return _executed(task, profiles, traffic, layout=layout, streams=streams, times=times, loads=loads)


def _executed(
    task: Task,
    profiles: Sequence[RankProfile],
    traffic: Traffic,
    layout: Layout,
    streams: Sequence[Stream],
    *,
    times: float,
    loads: Sequence[float],
) -> PipelineForecast | None:
    blocks = [len(layout.blocks_of(rank)) for rank in range(len(profiles))]
    memory = tuple(
        stage_bytes(task, profile, traffic, rank, count)
        for rank, (profile, count) in enumerate(zip(profiles, blocks))
    )
    ram = {host: 0 for host in _hosts(profiles)}
    for host, profile, count, nbytes in zip(_hosts(profiles), profiles, blocks, memory):
        beside = PROCESS_BYTES["gpu"] if profile.node.device.kind == "gpu" else nbytes
        ram[host] += beside + (count * sizes(task.shape, task.type_bytes).block if loads else 0)
    if any(nbytes > usable_bytes(profile) for nbytes, profile in zip(memory, profiles)) or any(
        ram[host] > profile.node.ram for host, profile in zip(_hosts(profiles), profiles)
    ):
        return None
    # Loads are as many whatever the number of micro-batches: of a shortened step they are shortened too.
    line = execute(streams, times_of(task, traffic, profiles, layout, [load / times for load in loads]))
    device = max(
        nbytes if profile.node.device.kind == "gpu" else 0 for nbytes, profile in zip(memory, profiles)
    )
    return PipelineForecast(
        tuple(map(len, layout.chunks)),
        device,
        max(ram.values()),
        seconds=line.seconds * times,
        bubble=line.bubble,
        recompute=traffic.recompute,
        loads=bool(loads),
    )


def times_of(
    task: Task, traffic: Traffic, profiles: Sequence[RankProfile], layout: Layout, loads: Sequence[float] = ()
) -> PipelineTimes:
    """Of one micro-batch."""
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
    """A name for each rank's host: ranks of one stand behind each other."""
    at = 0
    while at < len(profiles):
        here = min(profiles[at].ranks_here, len(profiles) - at)
        yield from [f"host {at}"] * here
        at += here
