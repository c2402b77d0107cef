"""Seconds of one optimizer step, by cause. Pure.

Arithmetic is c N t operations for t tokens through N frozen parameters: c = 4 for forward and gradients of
inputs, 6 where blocks are computed again. Loads and block inputs travel beside it; what does not hide is
found by walking through one step (`walk`).
"""

from fedspeed.errors import PlanError
from fedspeed.planner.hardware import Device
from fedspeed.planner.memory import kept_count, quantised_block, sizes, slots_of
from fedspeed.planner.plan import STREAMED, RankProfile, Seconds, Setting, Task
from fedspeed.planner.step_timeline import BlockTimes, StreamedBase, step_time
from fedspeed.schedule.limits import QUANTISED
from fedspeed.schedule.loads import spread

# Python and launches of one micro-batch in one block, forward and backward: the least it takes. On a GPU's
# host some 310 launches in all.
MIN_BLOCK_S = {"gpu": (1.0e-3, 1.5e-3), "cpu": (3e-4, 5e-4)}
LOAD_START = 2e-4  # of one load, whatever its size
OPTIMIZER_START = 1e-2  # of one optimizer step
COLLECTIVE_START = 5e-5  # of one collective, per rank that takes part


def seconds_of(task: Task, setting: Setting, profile: RankProfile) -> Seconds:
    """One optimizer step of every client of a rank: as many passes as it takes to seat them all."""
    if setting.tier == "stock":
        causes = _stock(task, setting, profile)
        loads = 0.0
        return Seconds(
            {cause: profile.carried * t for cause, t in causes.items()}, loads, exchange_s(task, profile)
        )
    client_slots = min(setting.client_slots, profile.carried)
    full, rest = divmod(profile.carried, client_slots)
    causes, loads = _pass(task, setting, profile, client_slots)
    causes = {cause: full * t for cause, t in causes.items()}
    loads = full * loads
    if rest:
        more, more_loads = _pass(task, setting, profile, rest)
        causes = {cause: t + more[cause] for cause, t in causes.items()}
        loads = loads + more_loads
    return Seconds(causes, loads, exchange_s(task, profile))


def arithmetic_of(task: Task, setting: Setting, profile: RankProfile) -> float:
    """Seconds of a step if nothing had to be waited for: no setting with as many kept activations can be
    faster.
    """
    if setting.tier == "stock":
        return seconds_of(task, setting, profile).total
    times = block_times_of(task, setting, profile)
    n = task.shape.layers
    client_slots = min(setting.client_slots, profile.carried)
    full, rest = divmod(profile.carried, client_slots)
    micro_batches = profile.carried * setting.accumulation
    kept = full * kept_count(task, setting, client_slots * setting.accumulation)
    kept += kept_count(task, setting, rest * setting.accumulation)
    computed = (
        micro_batches * (n * (times.forward + times.gradients) + times.head)
        + ((n - 1) * micro_batches - kept) * times.recompute
    )
    return computed + sum(_optimizer_step(task, profile, profile.carried).values())


def exchange_s(task: Task, profile: RankProfile) -> float:
    """One round's exchange of updates: every gateway sends and receives 2 (n-1)/n of a vector of fp32;
    gateways of a node share its link.
    """
    n = profile.participants
    rate = profile.node.link_rate if n > profile.participants_here else profile.node.local_rate
    return 2 * (n - 1) / n * task.trainable * 4 * profile.participants_here / rate if n > 1 else 0.0


def load_s(nbytes: int, setting: Setting, profile: RankProfile) -> float:
    """Bringing one unit of the base onto the device, one of many. Ranks of a node share its memory's, its
    disk's and its link's bandwidth.
    """
    node = profile.node
    here = profile.ranks_here
    copying = nbytes / copy_rate(node.device.host_rate, profile)
    if setting.tier == "ram":
        return LOAD_START + copying
    if setting.tier == "nvme":  # on a GPU into one of two page-locked buffers, while the other one is copied
        reading = nbytes * here / node.disk_rate
        return LOAD_START + (max(reading, copying) if node.device.kind == "gpu" else reading)
    if setting.tier == "client":
        return LOAD_START + gather_s(nbytes, profile.client_ranks, profile.client_nodes, profile)
    return LOAD_START + gather_s(nbytes, profile.cluster_ranks, profile.cluster_nodes, profile)


def copy_rate(rate: float, profile: RankProfile) -> float:
    """Bytes/s of a copy between host memory and the device at `rate`, or within host memory where that is the
    device's.
    """
    node = profile.node
    here = profile.ranks_here
    return min(rate, 2 * node.ram_rate / here) if node.device.kind == "gpu" else node.ram_rate / here


def gather_s(nbytes: int, ranks: int, nodes: int, profile: RankProfile) -> float:
    """All-gather in a ring: across nodes all but a node's own part crosses its link once, however many ranks
    it has.
    """
    start = COLLECTIVE_START * ranks
    if nodes > 1:
        return start + nbytes * (nodes - 1) / nodes / profile.node.link_rate
    return start + nbytes * (ranks - 1) / ranks / profile.node.local_rate


def matrix_rate(task: Task, device: Device) -> float:
    """FLOP/s of matrix products under engine.matmul.

    Raises:
        PlanError: the device has no such arithmetic, or nobody has measured or published it.
    """
    plain = device.flops[task.dtype]
    if device.kind != "gpu":
        return plain
    if task.matmul == "fp16_accumulation" and task.dtype == "fp16":
        return device.fp16_accumulation or plain
    if task.matmul == "tf32" and task.dtype == "fp32":
        if not device.tf32:
            raise PlanError(
                f"engine.matmul=tf32: no rate of tf32 is known of {device.name}, which cards before Ampere "
                "do not "
                "have; set engine.matmul=default, or run `fedspeed probe` on it"
            )
        return device.tf32
    return plain


def block_times_of(task: Task, setting: Setting, profile: RankProfile) -> BlockTimes:
    """What one micro-batch takes in one block: arithmetic and reading the weights once (which makes small
    micro-batches dearer), but not less than starting the kernels.
    """
    shape = task.shape
    device = profile.node.device
    shared = profile.ranks_here if device.kind == "cpu" else 1
    rate = matrix_rate(task, device) / shared
    attention_rate = device.flops[task.dtype] / shared
    tokens = setting.micro_batch * task.tokens
    matrices = 2 * shape.block * tokens
    scores = 4 * shape.heads * shape.head_dim * task.tokens * tokens
    lora = 0 if task.method == "full" else 2 * task.trainable // shape.layers * tokens
    reading = shape.block * task.type_bytes / device.memory_rate
    start_forward, start_backward = device.launch_s or MIN_BLOCK_S[device.kind]
    forward = max((matrices + lora) / rate + scores / attention_rate + reading, start_forward)
    own = matrices if task.method == "full" else 2 * lora  # gradients of what trains
    gradients = max((matrices + lora + own) / rate + 2.5 * scores / attention_rate + reading, start_backward)
    again = forward if setting.tier != "stock" or setting.checkpointing else 0.0
    answers = task.answer_share if setting.tier != "stock" else 1.0
    head = (6 if task.method == "full" else 4) * shape.embedding * answers * tokens / rate
    return BlockTimes(
        forward,
        again,
        gradients,
        head,
        _input_transfer_s(tokens * shape.hidden * task.type_bytes, setting, profile),
    )


def _input_transfer_s(nbytes: int, setting: Setting, profile: RankProfile) -> float:
    """One block input of one micro-batch to host memory, or back: the slower of the two."""
    device = profile.node.device
    if setting.tier == "stock" or setting.block_inputs != "host" or device.kind != "gpu":
        return 0.0
    return nbytes / copy_rate(min(device.host_rate, device.down_rate or device.host_rate), profile)


def streamed_base_of(task: Task, setting: Setting, profile: RankProfile, carried: float) -> StreamedBase:
    """Where the blocks are and how long they take to come. `carried`: seconds in which the inputs of one
    block go to the host.
    """
    n = task.shape.layers
    unit = sizes(task.shape, task.type_bytes)
    if setting.tier not in STREAMED:
        return StreamedBase(n, 0, 0.0, frozenset(range(n)))
    resident = frozenset(spread(n, setting.resident_blocks)) if setting.resident_blocks else frozenset()
    # Where the embedding cannot be read row by row it takes turns with the head in their one slot; a tied one
    # stays in it.
    ahead = (
        load_s(unit.head, setting, profile) if setting.tier in ("client", "cluster") and unit.head else 0.0
    )
    shares_copy_engine = setting.tier == "ram"
    alone = profile.node.device.host_rate
    both = profile.node.device.both_rate
    slowdown = carried * max(0.0, 1 - both / alone) if shares_copy_engine and both else 0.0
    load = load_s(unit.block, setting, profile)
    return StreamedBase(
        n,
        slots_of(task, setting),
        load,
        resident,
        head_load=ahead,
        shares_copy_engine=shares_copy_engine,
        slowdown=slowdown,
    )


def _pass(
    task: Task, setting: Setting, profile: RankProfile, client_slots: int
) -> tuple[dict[str, float], float]:
    """(causes, seconds of all loads) of one layer-major pass over `client_slots` clients."""
    n = task.shape.layers
    micro_batches = client_slots * setting.accumulation
    times = block_times_of(task, setting, profile)
    update = _optimizer_step(task, profile, client_slots)
    base = streamed_base_of(task, setting, profile, micro_batches * times.input_transfer)
    kept = kept_count(task, setting, micro_batches)
    step = step_time(
        times, base, micro_batches, inputs=setting.block_inputs, kept=kept, fixed=sum(update.values())
    )
    waited = step.waited_for_loads
    loads = 2 * max(0, n - len(base.resident) - base.slots) * base.load + 2 * base.head_load
    if setting.tier in QUANTISED:  # the device's own arithmetic: nothing hides it
        block = quantised_block(task, setting.tier) + sizes(task.shape, task.type_bytes).block
        once = LOAD_START + block / profile.node.device.memory_rate
        loads = 2 * max(0, n - setting.resident_blocks - slots_of(task, setting)) * once
        waited = loads
    causes = {
        "forward": n * micro_batches * times.forward,
        "again": ((n - 1) * micro_batches - kept) * times.recompute,
        "gradients": n * micro_batches * times.gradients,
        "head": micro_batches * times.head,
        "block inputs": step.waited_for_inputs,
        "waiting for loads": waited,
    }
    return causes | update, loads


def _stock(task: Task, setting: Setting, profile: RankProfile) -> dict[str, float]:
    times = block_times_of(task, setting, profile)
    n = task.shape.layers
    micro_batches = setting.accumulation
    return {
        "forward": n * micro_batches * times.forward,
        "again": n * micro_batches * times.recompute,
        "gradients": n * micro_batches * times.gradients,
        "head": micro_batches * times.head,
    } | _optimizer_step(task, profile, 1)


def _optimizer_step(task: Task, profile: RankProfile, client_slots: int) -> dict[str, float]:
    """Summing gradients over a client's ranks, and the optimizer, which reads and writes copies, masters,
    moments and gradients.
    """
    p = task.trainable
    n = profile.client_ranks
    reduce = 2 * gather_s(p * task.type_bytes, n, profile.client_nodes, profile) if n > 1 else 0.0
    return {
        "optimizer": client_slots * (OPTIMIZER_START + 40 * p / profile.node.device.memory_rate),
        "client's ranks": client_slots * reduce,
    }
