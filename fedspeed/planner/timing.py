"""Seconds of one optimizer step, by cause. Pure.

The arithmetic is c N t operations for t tokens through N frozen parameters: c = 4 for the forward pass and
the gradients of the inputs, 6 where blocks are recomputed. Loads and block inputs are copied at the same
time; how long a step waits for them is found by simulating it (`step_timeline`).
"""

from fedspeed.errors import PlanError
from fedspeed.planner.hardware import Device
from fedspeed.planner.memory import kept_count, quantised_block, sizes, slots_of
from fedspeed.planner.plan import STREAMED, RankProfile, Seconds, Setting, Task
from fedspeed.planner.step_timeline import BlockTimes, StreamedBase, step_time
from fedspeed.schedule.limits import QUANTISED
from fedspeed.schedule.loads import spread

# Minimum seconds of one micro-batch in one block, forward and backward: Python and kernel launches, on a
# GPU's host about 310 of them together.
MIN_BLOCK_S = {"gpu": (1.0e-3, 1.5e-3), "cpu": (3e-4, 5e-4)}
LOAD_START = 2e-4  # seconds that every load takes in addition, whatever its size
OPTIMIZER_START = 1e-2  # the same of an optimizer step
COLLECTIVE_START = 5e-5  # the same of a collective, for each rank that takes part


def seconds_of(task: Task, setting: Setting, profile: RankProfile) -> Seconds:
    """Predict one optimizer step of every client of a rank, in as many passes as its client slots require."""
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
    """Return the seconds of a step without any waiting, a lower bound for all settings with as many kept
    activations.
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
    """Return the seconds of one round's exchange of updates.

    Each of n gateways sends and receives 2 (n-1)/n of a vector of fp32 values; gateways on a node share its
    link.
    """
    n = profile.participants
    rate = profile.node.link_rate if n > profile.participants_here else profile.node.local_rate
    return 2 * (n - 1) / n * task.trainable * 4 * profile.participants_here / rate if n > 1 else 0.0


def load_s(nbytes: int, setting: Setting, profile: RankProfile) -> float:
    """Return the seconds to load one unit of the base onto the device, in a sequence of loads.

    The ranks of a node share the bandwidth of its memory, its disk and its link.
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
    """Return the bytes/s of a copy between host memory and a GPU whose bus has `rate`; for a CPU, those of a
    copy within host memory.
    """
    node = profile.node
    here = profile.ranks_here
    return min(rate, 2 * node.ram_rate / here) if node.device.kind == "gpu" else node.ram_rate / here


def gather_s(nbytes: int, ranks: int, nodes: int, profile: RankProfile) -> float:
    """Return the seconds of an all-gather in a ring.

    Between several nodes, everything but a node's own part crosses its link once, whatever its number of
    ranks.
    """
    start = COLLECTIVE_START * ranks
    if nodes > 1:
        return start + nbytes * (nodes - 1) / nodes / profile.node.link_rate
    return start + nbytes * (ranks - 1) / ranks / profile.node.local_rate


def matrix_rate(task: Task, device: Device) -> float:
    """Return the FLOP/s of matrix products under engine.matmul.

    Raises:
        PlanError: the device has no such arithmetic, or its rate is neither measured nor published.
    """
    plain = device.flops[task.dtype]
    if device.kind != "gpu":
        return plain
    if task.matmul == "fp16_accumulation" and task.dtype == "fp16":
        return device.fp16_accumulation or plain
    if task.matmul == "tf32" and task.dtype == "fp32":
        if not device.tf32:
            raise PlanError(
                f"engine.matmul=tf32: no rate of tf32 is known of {device.name} (cards before Ampere have "
                "none); set engine.matmul=default, or run `fedspeed probe` on it"
            )
        return device.tf32
    return plain


def block_times_of(task: Task, setting: Setting, profile: RankProfile) -> BlockTimes:
    """Predict the times of one micro-batch in one block.

    They are those of the arithmetic and of reading the weights once (so that small micro-batches cost more a
    token), but at least those of launching the kernels.
    """
    shape = task.shape
    device = profile.node.device
    shared = profile.ranks_here if device.kind == "cpu" else 1
    rate = matrix_rate(task, device) / shared
    attention_rate = device.flops[task.dtype] / shared
    tokens = setting.micro_batch * task.tokens
    matrices = 2 * shape.active_block * tokens
    scores = 4 * shape.heads * shape.head_dim * task.tokens * tokens
    lora = 0 if task.method == "full" else 2 * task.trainable // shape.layers * tokens
    reading = shape.block * task.type_bytes / device.memory_rate
    start_forward, start_backward = device.launch_s or MIN_BLOCK_S[device.kind]
    forward = max((matrices + lora) / rate + scores / attention_rate + reading, start_forward)
    trained = matrices if task.method == "full" else 2 * lora  # gradients of the trainable parameters
    gradients = max(
        (matrices + lora + trained) / rate + 2.5 * scores / attention_rate + reading, start_backward
    )
    recompute = forward if setting.tier != "stock" or setting.checkpointing else 0.0
    answers = task.answer_share if setting.tier != "stock" else 1.0
    head = (6 if task.method == "full" else 4) * shape.embedding * answers * tokens / rate
    return BlockTimes(
        forward,
        recompute,
        gradients,
        head,
        _input_transfer_s(tokens * shape.hidden * task.type_bytes, setting, profile),
    )


def _input_transfer_s(nbytes: int, setting: Setting, profile: RankProfile) -> float:
    """Return the seconds to copy one block input of one micro-batch to the host or back (the slower one)."""
    device = profile.node.device
    if setting.tier == "stock" or setting.block_inputs != "host" or device.kind != "gpu":
        return 0.0
    return nbytes / copy_rate(min(device.host_rate, device.down_rate or device.host_rate), profile)


def streamed_base_of(task: Task, setting: Setting, profile: RankProfile, input_s: float) -> StreamedBase:
    """Describe the base of a setting as the timeline of a step needs it.

    Args:
        input_s: seconds to copy the inputs of one block, of all micro-batches, to the host.
    """
    n = task.shape.layers
    unit = sizes(task.shape, task.type_bytes)
    if setting.tier not in STREAMED:
        return StreamedBase(n, 0, 0.0, frozenset(range(n)))
    resident = frozenset(spread(n, setting.resident_blocks)) if setting.resident_blocks else frozenset()
    # Where the embedding cannot be read row by row, it and the head are loaded in turn into one slot; where
    # they are one tensor, it stays there.
    head_load = 0.0
    if setting.tier in ("client", "cluster") and unit.head:
        head_load = load_s(unit.head, setting, profile)
    shares_copy_engine = setting.tier == "ram"
    alone = profile.node.device.host_rate
    both = profile.node.device.both_rate
    slowdown = input_s * max(0.0, 1 - both / alone) if shares_copy_engine and both else 0.0
    load = load_s(unit.block, setting, profile)
    return StreamedBase(
        n,
        slots_of(task, setting),
        load,
        resident,
        head_load=head_load,
        shares_copy_engine=shares_copy_engine,
        slowdown=slowdown,
    )


def _pass(
    task: Task, setting: Setting, profile: RankProfile, client_slots: int
) -> tuple[dict[str, float], float]:
    """Return (causes, seconds of all loads) of one layer-major pass over `client_slots` clients."""
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
    if setting.tier in QUANTISED:  # dequantisation occupies the device itself, so nothing hides it
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
    """Return the seconds of summing gradients over a client's ranks and of the optimizer, which reads and
    writes working copies, masters, moments and gradients.
    """
    p = task.trainable
    n = profile.client_ranks
    reduce = 2 * gather_s(p * task.type_bytes, n, profile.client_nodes, profile) if n > 1 else 0.0
    return {
        "optimizer": client_slots * (OPTIMIZER_START + 40 * p / profile.node.device.memory_rate),
        "client's ranks": client_slots * reduce,
    }
