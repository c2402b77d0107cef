"""What a pipeline costs on given machines: its instruction streams, executed against the planner's model of
time. Pure.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fedspeed.planner.memory import PROCESS, sizes
from fedspeed.planner.pipeline.division import (
    Traffic,
    client_traffic,
    cluster_traffic,
    divide,
    room,
    stage_bytes,
)
from fedspeed.planner.pipeline.execute import execute
from fedspeed.planner.pipeline.times import PipelineTimes
from fedspeed.planner.plan import Place, Setting, Task
from fedspeed.planner.timing import load_s, seconds_of, visits_of
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
    task: Task, places: Sequence[Place], clients: int, micro_batch: int, micros: int
) -> PipelineForecast | None:
    """The clients of some ranks over these, with `micros` micro-batches each: the fastest of all weights
    resident, with blocks computed again or not, and
    chunks that are loaded. None: none fits.
    """
    made = min(micros, -(-MAX_MICROS // clients))
    ranks = len(places)
    turns = [client for client, _ in taking_turns([made] * clients)]
    found = [
        _resident(
            task,
            places,
            client_traffic(ranks, micro_batch, micros * clients, recompute, clients),
            one_f_one_b(ranks, turns),
            micros / made,
        )
        for recompute in (False, True)
    ]
    layout = interleaved(task.shape.layers, ranks, SLOTS // 2)
    traffic = replace(
        client_traffic(ranks, micro_batch, micros * clients, True, clients),
        held=(micros * clients,) * ranks,
        slots=SLOTS,
    )
    found.append(
        _loaded(
            task,
            places,
            traffic,
            layout=layout,
            streams=streamed(ranks, len(layout.chunks), turns),
            times=micros / made,
        )
    )
    return min(filter(None, found), key=lambda one: one.seconds, default=None)


def cluster_pipeline(
    task: Task, places: Sequence[Place], owners: Sequence[int], micro_batch: int, micros: int
) -> PipelineForecast | None:
    """All clients of a cluster over all its ranks, with `micros` micro-batches each. owners: the rank that
    embeds and has the labels, of each client.
    """
    made = min(micros, -(-MAX_MICROS // len(owners)))
    ranks = len(places)
    streams = shared([Micro(c, owners[c], owners[c]) for c, _ in taking_turns([made] * len(owners))], ranks)
    found = [
        _resident(
            task,
            places,
            cluster_traffic(ranks, owners, micro_batch, micros * len(owners), recompute),
            streams,
            micros / made,
        )
        for recompute in (False, True)
    ]
    return min(filter(None, found), key=lambda one: one.seconds, default=None)


def _resident(
    task: Task, places: Sequence[Place], traffic: Traffic, streams: Sequence[Stream], times: float
) -> PipelineForecast | None:
    cuts = divide(task, places, traffic)
    return cuts and _executed(
        task, places, traffic, layout=stages(cuts), streams=streams, times=times, loads=()
    )


def _loaded(
    task: Task,
    places: Sequence[Place],
    traffic: Traffic,
    layout: Layout,
    streams: Sequence[Stream],
    *,
    times: float,
) -> PipelineForecast | None:
    setting = Setting("ram", traffic.micro_batch, 1)
    block = sizes(task.shape, task.type_bytes).block
    loads = [
        load_s(len(chunk) * block, setting, places[holder])
        for chunk, holder in zip(layout.chunks, layout.holders)
    ]
    return _executed(task, places, traffic, layout=layout, streams=streams, times=times, loads=loads)


def _executed(
    task: Task,
    places: Sequence[Place],
    traffic: Traffic,
    layout: Layout,
    streams: Sequence[Stream],
    *,
    times: float,
    loads: Sequence[float],
) -> PipelineForecast | None:
    blocks = [len(layout.blocks_of(rank)) for rank in range(len(places))]
    memory = tuple(
        stage_bytes(task, place, traffic, rank, count)
        for rank, (place, count) in enumerate(zip(places, blocks))
    )
    ram = {host: 0 for host in _hosts(places)}
    for host, place, count, nbytes in zip(_hosts(places), places, blocks, memory):
        beside = PROCESS["gpu"] if place.node.device.kind == "gpu" else nbytes
        ram[host] += beside + (count * sizes(task.shape, task.type_bytes).block if loads else 0)
    if any(nbytes > room(place) for nbytes, place in zip(memory, places)) or any(
        ram[host] > place.node.ram for host, place in zip(_hosts(places), places)
    ):
        return None
    # Loads are as many whatever the number of micro-batches: of a shortened step they are shortened too.
    line = execute(streams, times_of(task, traffic, places, layout, [load / times for load in loads]))
    device = max(nbytes if place.node.device.kind == "gpu" else 0 for nbytes, place in zip(memory, places))
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
    task: Task, traffic: Traffic, places: Sequence[Place], layout: Layout, loads: Sequence[float] = ()
) -> PipelineTimes:
    """Of one micro-batch."""
    setting = traffic.setting()
    visits = [visits_of(task, setting, place) for place in places]
    forward = [visits[holder].forward * len(chunk) for chunk, holder in zip(layout.chunks, layout.holders)]
    backward = [
        (visits[holder].again + visits[holder].gradients) * len(chunk)
        for chunk, holder in zip(layout.chunks, layout.holders)
    ]
    steps = [
        seconds_of(task, setting, place).causes["optimizer"] * len(layout.blocks_of(rank)) / task.shape.layers
        for rank, place in enumerate(places)
    ]
    hosts = list(_hosts(places))
    return PipelineTimes(
        forward,
        backward,
        [visit.head for visit in visits],
        steps=steps,
        embeds=[0.0] * len(places),
        nbytes=traffic.tokens(task) * task.shape.hidden * task.type_bytes,
        hosts=hosts,
        rates={host: place.node.link_rate for host, place in zip(hosts, places)},
        local_rate=min(place.node.local_rate for place in places),
        latency=LATENCY_S,
        loads=loads,
    )


def _hosts(places: Sequence[Place]) -> Iterator[str]:
    """A name for each rank's host: ranks of one stand behind each other."""
    at = 0
    while at < len(places):
        here = min(places[at].ranks_here, len(places) - at)
        yield from [f"host {at}"] * here
        at += here
