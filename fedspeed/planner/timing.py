"""Seconds of one optimizer step, by cause. Pure.

Arithmetic is c N t operations for t tokens through N frozen parameters: c = 4 for forward and gradients of inputs, 6 where blocks are computed
again. Loads run beside it, one after the other, each as soon as a slot is free; what does not hide is found by walking through one pass.
"""

from dataclasses import dataclass

from fedspeed.engine.config import QUANTISED
from fedspeed.planner.memory import quantised_block, shelf_bytes, sizes, slots_of
from fedspeed.planner.plan import STREAMED, Place, Seconds, Setting, Task

VISIT = {"gpu": (1.0e-3, 1.5e-3), "cpu": (3e-4, 5e-4)}  # Python and launches of one block, forward and backward: the least it takes
LOAD_START = 2e-4  # of one load, whatever its size
OPTIMIZER_START = 1e-2  # of one optimizer step
COLLECTIVE_START = 5e-5  # of one collective, per rank that takes part


@dataclass(frozen=True)
class Visits:
    """Seconds that all micro-batches of a pass spend in one block: forward, again in the backward pass, its gradients; and in the head."""

    forward: float
    again: float
    gradients: float
    head: float
    shelf: float  # carrying the block's inputs to host memory, and the same back


def seconds_of(task: Task, setting: Setting, place: Place) -> Seconds:
    """One optimizer step of every client of a rank: as many passes as it takes to seat them all."""
    if setting.tier == "stock":
        causes, loads = _stock(task, setting, place), 0.0
        return Seconds({cause: place.carried * t for cause, t in causes.items()}, loads, exchange_s(task, place))
    seats = min(setting.seats, place.carried)
    full, rest = divmod(place.carried, seats)
    causes, loads = _pass(task, setting, place, seats)
    causes, loads = {cause: full * t for cause, t in causes.items()}, full * loads
    if rest:
        more, more_loads = _pass(task, setting, place, rest)
        causes, loads = {cause: t + more[cause] for cause, t in causes.items()}, loads + more_loads
    return Seconds(causes, loads, exchange_s(task, place))


def exchange_s(task: Task, place: Place) -> float:
    """One round's exchange of updates: every gateway sends and receives 2 (n-1)/n of a vector of fp32; gateways of a node share its link."""
    n = place.participants
    rate = place.node.link_rate if n > place.participants_here else place.node.local_rate
    return 2 * (n - 1) / n * task.trainable * 4 * place.participants_here / rate if n > 1 else 0.0


def load_s(nbytes: int, setting: Setting, place: Place) -> float:
    """Bringing one unit of the base onto the device. Ranks of a node share its memory's, its disk's and its link's bandwidth."""
    node, here = place.node, place.ranks_here
    into = min(node.device.host_rate, 2 * node.ram_rate / here) if node.device.kind == "gpu" else node.ram_rate / here
    if setting.tier == "ram":
        return LOAD_START + nbytes / into
    if setting.tier == "nvme":  # read into a page-locked buffer, then copied, before the next read begins
        return LOAD_START + nbytes * here / node.disk_rate + (nbytes / into if node.device.kind == "gpu" else 0.0)
    if setting.tier == "client":
        return LOAD_START + gather_s(nbytes, place.client_ranks, place.client_nodes, place)
    return LOAD_START + gather_s(nbytes, place.cluster_ranks, place.cluster_nodes, place)


def gather_s(nbytes: int, ranks: int, nodes: int, place: Place) -> float:
    """All-gather in a ring: across nodes all but a node's own part crosses its link once, however many ranks it has."""
    start = COLLECTIVE_START * ranks
    if nodes > 1:
        return start + nbytes * (nodes - 1) / nodes / place.node.link_rate
    return start + nbytes * (ranks - 1) / ranks / place.node.local_rate


def walk(visits: Visits, load: float, ahead: float, blocks: int, resident: int, slots: int) -> tuple[float, float]:
    """(seconds of one pass through all blocks and back, of them waited for loads).

    The first `resident` blocks never move. At the start the next `slots` blocks are loaded: the pass before ended with them. A slot becomes
    free when its block has been used and will not be used again before the others; the turn at the last block begins with what is held.

    Args:
        load: seconds of one block's load; ahead: of the end unit that is loaded before the blocks, in each direction.
        blocks: N; of the N - resident that stream, the first forward and the first backward ones need no load.
    """
    forward, backward = visits.forward + visits.shelf, visits.again + visits.gradients + visits.shelf
    last = visits.forward + visits.head + visits.gradients
    streamed = blocks - resident
    clock = resident * (forward if streamed else 0.0)
    if not streamed:
        return (blocks - 1) * (forward + backward) + last, 0.0
    waited, channel, ends = 0.0, ahead, []
    for i in range(streamed):
        if i >= slots:
            channel = max(channel, ends[i - slots]) + load
            waited += max(0.0, channel - clock)
            clock = max(clock, channel)
        clock += forward if i < streamed - 1 else last
        ends.append(clock)
    channel, ends = max(channel, clock if ahead else 0.0) + ahead, [clock]
    for i in range(1, streamed):
        if i >= slots:
            channel = max(channel, ends[i - slots]) + load
            waited += max(0.0, channel - clock)
            clock = max(clock, channel)
        clock += backward
        ends.append(clock)
    return clock + resident * backward, waited


def visits_of(task: Task, setting: Setting, place: Place, cells: int) -> Visits:
    """What `cells` micro-batches take in one block: arithmetic and reading the weights once (which makes small micro-batches dearer), but not less
    than starting the kernels."""
    shape, device = task.shape, place.node.device
    rate = device.flops[task.dtype] / (place.ranks_here if device.kind == "cpu" else 1)
    tokens = setting.micro_batch * task.tokens
    matrices = 2 * shape.block * tokens
    scores = 4 * shape.heads * shape.head_dim * task.tokens * tokens
    lora = 0 if task.method == "full" else 2 * task.trainable // shape.layers * tokens
    reading = shape.block * task.type_bytes / device.memory_rate
    start_forward, start_backward = VISIT[device.kind]
    forward = max((matrices + scores + lora) / rate + reading, start_forward)
    own = matrices if task.method == "full" else 2 * lora  # gradients of what trains
    gradients = max((matrices + 2.5 * scores + lora + own) / rate + reading, start_backward)
    again = forward if setting.tier != "stock" or setting.checkpointing else 0.0
    answers = task.answer_share if setting.tier != "stock" else 1.0
    head = (6 if task.method == "full" else 4) * shape.embedding * answers * tokens / rate
    shelf = shelf_bytes(task, setting) / device.host_rate if setting.tier != "stock" and setting.block_inputs == "host" and device.kind == "gpu" else 0.0
    return Visits(*(cells * t for t in (forward, again, gradients, head, shelf)))


def _pass(task: Task, setting: Setting, place: Place, seats: int) -> tuple[dict[str, float], float]:
    """(causes, seconds of all loads) of one layer-major pass over `seats` clients."""
    shape, unit = task.shape, sizes(task.shape, task.type_bytes)
    visits = visits_of(task, setting, place, seats * setting.accumulation)
    n, slots = shape.layers, slots_of(task, setting)
    load, ahead, resident = 0.0, 0.0, n
    if setting.tier in STREAMED:
        load, resident = load_s(unit.block, setting, place), setting.resident_blocks
        # Where the embedding cannot be read row by row it takes turns with the head in their one slot; a tied one stays in it.
        ahead = load_s(unit.head, setting, place) if setting.tier in ("client", "cluster") and unit.head else 0.0
    if setting.tier in QUANTISED:  # the device's own arithmetic: nothing hides it
        resident = setting.resident_blocks
        load = LOAD_START + (quantised_block(task, setting.tier) + unit.block) / place.node.device.memory_rate
        waited = 2 * max(0, n - resident - slots) * load
    else:
        _, waited = walk(visits, load, ahead, n, resident, slots)
    loads = 2 * max(0, n - resident - slots) * load + 2 * ahead
    causes = {"forward": n * visits.forward, "again": (n - 1) * visits.again, "gradients": n * visits.gradients, "head": visits.head,
              "block inputs": 2 * (n - 1) * visits.shelf, "waiting for loads": waited}
    return causes | _update(task, place, seats), loads


def _stock(task: Task, setting: Setting, place: Place) -> dict[str, float]:
    visits = visits_of(task, setting, place, setting.accumulation)
    n = task.shape.layers
    return {"forward": n * visits.forward, "again": n * visits.again, "gradients": n * visits.gradients, "head": visits.head} | _update(task, place, 1)


def _update(task: Task, place: Place, seats: int) -> dict[str, float]:
    """Summing gradients over a client's ranks, and the optimizer, which reads and writes copies, masters, moments and gradients."""
    p, n = task.trainable, place.client_ranks
    reduce = 2 * gather_s(p * task.type_bytes, n, place.client_nodes, place) if n > 1 else 0.0
    return {"optimizer": seats * (OPTIMIZER_START + 40 * p / place.node.device.memory_rate), "client's ranks": seats * reduce}

