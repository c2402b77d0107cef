"""The fastest setting that fits, why the others lost, and what would help where none fits. Pure.

Every setting is weighed on every kind of rank; the slowest rank of the slowest cluster counts, since a round ends with it. What is tried
does not depend on the memory there is, so that more memory never gives a slower plan.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fedspeed.cluster.topology import Topology
from fedspeed.errors import PlanError
from fedspeed.planner.hardware import GIB, OF_GPU_MEMORY, RAM_KEPT, Node
from fedspeed.planner.memory import kept_bytes, memory_of
from fedspeed.planner.plan import SLOTTED, STREAMED, Alternative, ClusterPlan, Forecast, Memory, Place, Plan, Setting, Task
from fedspeed.planner.timing import arithmetic_of, seconds_of
from fedspeed.schedule.limits import QUANTISED

TOKENS_STEP = 8  # lengths are padded to multiples of it
TINY_S = 1e-6  # times closer than this are equal

Places = Mapping[str, Sequence[Place]]  # by cluster


@dataclass(frozen=True)
class Change:
    """Something to change so that a task fits. `apply` shows it on the same inputs.

    Attributes:
        key: a key of a run, or quantised (allow it), gpu_gib (nominal size of each card), ram_gib (whole size of each host), nvme (GiB of each host), or
            both: two changes.
    """

    key: str
    value: float | str | bool | tuple["Change", "Change"]
    text: str


def plan(task: Task, topology: Topology, nodes: Mapping[str, Node], notes: Sequence[str] = ()) -> Plan:
    """The plan for a task on clients laid out on nodes.

    Args:
        nodes: by host name, at least those that work.

    Raises:
        PlanError: nothing fits; `changes` names what would.
    """
    places = places_of(topology, nodes)
    best = fastest(task, [place for group in places.values() for place in group])
    if best is None:
        raise refusal(task, places)
    clusters = []
    for name, group in places.items():
        own = best if len(places) == 1 else fastest(task, group)
        clusters.append(ClusterPlan(name, tuple(group), _forecast(task, best, name, group), own, _forecast(task, own, name, group)))
    everywhere = [place for group in places.values() for place in group]
    return Plan(task, topology, best, tuple(clusters), tuple(alternatives(task, everywhere, best)), tuple(notes))


def places_of(topology: Topology, nodes: Mapping[str, Node]) -> dict[str, list[Place]]:
    """The different kinds of ranks of each cluster. Nodes that differ by name only are one kind."""
    found: dict[str, list[Place]] = {}
    for rank in topology.ranks:
        if rank.clients and (place := place_of(topology, nodes, rank.world_rank)) not in found.setdefault(rank.cluster, []):
            found[rank.cluster].append(place)
    return found


def place_of(topology: Topology, nodes: Mapping[str, Node], world_rank: int) -> Place:
    """Where a rank that works stands."""
    hosts = {place.world_rank: place.host for place in topology.ranks}
    rank = topology.place(world_rank)
    cluster = topology.cluster_of(rank.cluster)
    ranks_here = sum(place.host == rank.host for place in topology.ranks if place.clients)
    gateways_here = sum(hosts[gateway] == rank.host for gateway in topology.participants)
    own = topology.clients[rank.clients[0]].ranks
    return Place(replace(nodes[rank.host], name="", assumed=()), ranks_here, len(own), len(cluster.ranks), len({hosts[r] for r in cluster.ranks}),
                 len(rank.clients), len(topology.participants), gateways_here, len({hosts[r] for r in own}))


def fastest(task: Task, places: Sequence[Place]) -> Setting | None:
    """The setting with the shortest step on the slowest of `places`; among equals the one that takes least device memory. None: none fits."""
    found = []
    least = float("inf")
    for family in families(task, places):
        if one := _best_of(task, family, places, least):
            found.append(one)
            least = min(least, one[0])
    if not found:
        return None
    equal = [narrowest(task, setting, places, least) for time, setting in found if time == least]
    return min(equal, key=lambda setting: max(_peak(task, setting, place) for place in places))


def families(task: Task, places: Sequence[Place]) -> Iterator[Setting]:
    """Every setting to be weighed, with one slot, no block resident and no activations kept: `grown` finds
    how many fit."""
    carried = max(place.carried for place in places)
    gpu = any(place.node.device.kind == "gpu" for place in places)
    for micro in [task.micro_batch] if task.micro_batch else [m for m in range(task.rows, 0, -1) if task.rows % m == 0]:
        steps = task.rows // micro
        for checkpointing in (False, True):
            yield Setting("stock", micro, steps, slots=0, block_inputs="device", checkpointing=checkpointing)
        if task.method == "full":
            continue
        for inputs in ("device", "host") if gpu else ("device",):
            for seats in sorted({carried, -(-carried // 2), 1}, reverse=True):
                yield Setting("resident", micro, steps, slots=0, seats=seats, block_inputs=inputs)
                for tier in SLOTTED if task.quantised else STREAMED:
                    if tier == "client" and all(place.client_ranks == 1 for place in places):
                        continue  # a client of one rank would hold all of it, and slots besides
                    yield Setting(tier, micro, steps, 0, 1, seats, inputs)


def grown(task: Task, family: Setting, places: Sequence[Place]) -> Iterator[Setting]:
    """Every way to spend spare device memory on a family that fits: each number of slots, with as many kept
    activations as fit beside them.

    Blocks are resident only where host memory or disk has no room for their copy: slots are worth more for
        the same bytes. Quantised tiers are the other
    way round, since a block that is resident has no copy in fewer bits.
    """
    base = fewest_resident(task, family, places)
    if base is None:
        return
    if family.tier in QUANTISED:
        spent = [replace(base, resident_blocks=resident) for resident in range(task.shape.layers)]
    elif family.tier in STREAMED:
        spent = [
            replace(base, slots=slots) for slots in range(1, task.shape.layers - base.resident_blocks + 1)
        ]
    else:
        spent = [base]
    for setting in spent:
        if not all(fits(task, setting, place) for place in places):
            return
        yield setting if setting.tier == "stock" else keeping(task, setting, places)


def fewest_resident(task: Task, family: Setting, places: Sequence[Place]) -> Setting | None:
    """The family with as few resident blocks as host memory and disk ask for; None: it does not fit.

    Each block that stays on the device takes device memory there and frees as much where the base lives, so
    one number tells.
    """
    fewest = 0
    if family.tier in STREAMED:
        for place in places:
            none, one = (memory_of(task, replace(family, resident_blocks=r), place) for r in (0, 1))
            spare = spare_bytes(none, place)
            for lacking, freed in (
                (-spare[1], none.ram_bytes - one.ram_bytes),
                (-spare[2], none.nvme_bytes - one.nvme_bytes),
            ):
                if lacking > 0 and freed > 0:
                    fewest = max(fewest, -(-lacking // freed))
    # Shares of a divided base are rounded up, which the straight line between none and one does not know.
    found = (
        replace(family, resident_blocks=r) for r in (fewest, fewest + 1) if r == 0 or r < task.shape.layers
    )
    return next((setting for setting in found if all(fits(task, setting, place) for place in places)), None)


def keeping(task: Task, setting: Setting, places: Sequence[Place]) -> Setting:
    """The setting with the activations of as many blocks and micro-batches as fit everywhere."""
    one = kept_bytes(task, setting)
    most = min(_micro_batches(setting, place) for place in places) * (task.shape.layers - 1)
    for place in places:
        # What comes and goes is the larger of two things, so beyond some number memory grows by the same for
        # each.
        lacking = _lacking(task, replace(setting, activation_bytes=most * one), place)
        if lacking > 0:
            each = lacking - _lacking(task, replace(setting, activation_bytes=(most - 1) * one), place)
            most = max(0, most - -(-lacking // each)) if each > 0 else 0
    while most and not all(
        fits(task, replace(setting, activation_bytes=most * one), place) for place in places
    ):
        most -= 1  # bytes are rounded
    return replace(setting, activation_bytes=most * one)


def _micro_batches(setting: Setting, place: Place) -> int:
    return min(setting.seats, place.carried) * setting.accumulation


def _lacking(task: Task, setting: Setting, place: Place) -> int:
    """Bytes that are lacking where a rank computes; negative: so many are spare."""
    spare = spare_bytes(memory_of(task, setting, place), place)
    return -(spare[0] if place.node.device.kind == "gpu" else spare[1])


def _best_of(
    task: Task, family: Setting, places: Sequence[Place], bound: float = float("inf")
) -> tuple[float, Setting] | None:
    """(time, setting) of the fastest way to spend memory on a family, the one with the fewest slots among
    equals. None: it does not fit, or not even its arithmetic is done within `bound`."""
    best = None
    for setting in grown(task, family, places):
        least = _rounded(max(arithmetic_of(task, setting, place) for place in places))
        if least > bound or (best is not None and least >= best[0]):
            break  # more slots leave less for activations, so that arithmetic only grows from here
        time = _time(task, setting, places)
        if best is None or time < best[0]:
            best = time, setting
    return best


def narrowest(task: Task, setting: Setting, places: Sequence[Place], time: float) -> Setting:
    """The setting with as few kept activations, then as few slots (quantised: resident blocks) as keep its
    time, which leaves memory free where loads hide anyway."""
    if setting.tier == "stock":
        return setting
    def keeps(changed: Setting) -> bool:
        return _time(task, changed, places) <= time

    one = kept_bytes(task, setting)
    fewest = _least(
        0, setting.activation_bytes // one, lambda n: keeps(replace(setting, activation_bytes=n * one))
    )
    setting = replace(setting, activation_bytes=fewest * one)
    if setting.tier in STREAMED:
        return replace(setting, slots=_least(1, setting.slots, lambda n: keeps(replace(setting, slots=n))))
    if setting.tier in QUANTISED:
        fewest = _least(0, setting.resident_blocks, lambda n: keeps(replace(setting, resident_blocks=n)))
        return replace(setting, resident_blocks=fewest)
    return setting


def spare_bytes(memory: Memory, place: Place) -> tuple[int, int, int]:
    """GPU, RAM and NVMe bytes left over; negative: so many are lacking."""
    return place.node.device.memory - memory.gpu_bytes, place.node.ram - memory.ram_bytes, place.node.nvme - memory.nvme_bytes


def fits(task: Task, setting: Setting, place: Place) -> bool:
    return min(spare_bytes(memory_of(task, setting, place), place)) >= 0


def alternatives(task: Task, places: Sequence[Place], best: Setting) -> Iterator[Alternative]:
    """The best of every other tier; of the winner's own tier the best with another micro-batch, seats, or
    place for block inputs, and itself with other slots or no activations."""
    kinds: dict[str, list[Setting]] = {}
    for family in families(task, places):
        same = _label(family) == _label(best)
        labels = [] if same else [_label(family)]
        if same:
            differing = [
                f"{name}={value}"
                for name, value, chosen in (
                    ("train.micro_batch", family.micro_batch, best.micro_batch),
                    ("engine.seats", family.seats, best.seats),
                    ("engine.block_inputs", family.block_inputs, best.block_inputs),
                )
                if value != chosen
            ]
            labels = differing if len(differing) == 1 else []
        for label in labels:
            kinds.setdefault(label, []).append(family)
    won = _time(task, best, places)
    for label, settings in kinds.items():
        weighed = [found for family in settings if (found := _best_of(task, family, places))]
        if weighed:
            time, setting = min(weighed, key=lambda pair: pair[0])
            yield _slower(label, task, narrowest(task, setting, places, time), best, places=places, won=won)
        else:
            yield Alternative(label, f"does not fit: {shortage(task, _most_frugal(settings), places)}")
    for label, setting in _varied(task, best):
        if all(fits(task, setting, place) for place in places):
            yield _slower(label, task, setting, best, places=places, won=won)
        else:
            _, lacks = max((_lack(task, setting, place) for place in places), key=lambda pair: pair[0])
            yield Alternative(label, f"does not fit: {lacks}")


def _varied(task: Task, best: Setting) -> Iterator[tuple[str, Setting]]:
    if best.tier in STREAMED:
        for slots in (best.slots - 1, best.slots + 1):
            if 1 <= slots <= task.shape.layers - best.resident_blocks:
                yield f"engine.slots={slots}", replace(best, slots=slots)
    if best.activation_bytes:
        yield "engine.activation_gib=0", replace(best, activation_bytes=0)


def _slower(
    label: str, task: Task, setting: Setting, best: Setting, *, places: Sequence[Place], won: float
) -> Alternative:
    time = _time(task, setting, places)
    reason = (
        f"{time:.2f} s a step against {won:.2f} s"
        if time > won
        else f"as fast ({time:.2f} s), {_more_memory(task, setting, best, places)}"
    )
    return Alternative(label, reason, setting, time)


def shortage(task: Task, settings: Sequence[Setting], places: Sequence[Place]) -> str:
    """What the least demanding of some settings lacks where it lacks most, in words with numbers; with as many resident blocks as lack least."""
    lacks = []
    for setting in settings:
        most = task.shape.layers - 1 if setting.tier in SLOTTED else 0
        if setting.tier == "nvme" and not all(place.node.nvme for place in places):
            most = 0  # resident blocks are no cure for a disk that is not there
        for resident in range(max(0, most) + 1):
            chosen = replace(setting, resident_blocks=resident)
            lacks.append(max((_lack(task, chosen, place) for place in places), key=lambda pair: pair[0]))
    return min(lacks, key=lambda pair: pair[0])[1]


def _lack(task: Task, setting: Setting, place: Place) -> tuple[int, str]:
    """(bytes lacking in all, what lacks)."""
    memory = memory_of(task, setting, place)
    needs = (memory.gpu_bytes, memory.ram_bytes, memory.nvme_bytes)
    words, total = [], 0
    for name, need, spare in zip(("GPU memory", "RAM", "NVMe"), needs, spare_bytes(memory, place)):
        if spare < 0:
            total -= spare
            had = f"{(need + spare) / GIB:.1f} to be had" if need + spare else "the hostfile names 0 folders (nvme=)"
            words.append(f"{need / GIB:.1f} GiB of {name} needed, {had}")
    where = f" with {setting.resident_blocks} blocks resident" if setting.resident_blocks else ""
    return total, f"{' and '.join(words)} (on {place.node.device.name}{where})"


def _more_memory(task: Task, setting: Setting, best: Setting, places: Sequence[Place]) -> str:
    more = max(_peak(task, setting, place) for place in places) - max(_peak(task, best, place) for place in places)
    return f"but takes {more / GIB:.2f} GiB more device memory" if more > 0 else f"device memory differs by {more / GIB:.2f} GiB"


def _label(setting: Setting) -> str:
    return setting.tier + (", recomputing" if setting.checkpointing else "")


def _peak(task: Task, setting: Setting, place: Place) -> int:
    memory = memory_of(task, setting, place)
    return memory.gpu_bytes or memory.ram_bytes


def _time(task: Task, setting: Setting, places: Sequence[Place]) -> float:
    return _rounded(max(seconds_of(task, setting, place).total for place in places))


def _rounded(seconds: float) -> float:
    return round(seconds / TINY_S) * TINY_S


def _forecast(task: Task, setting: Setting, name: str, places: Sequence[Place]) -> Forecast:
    """Of one cluster. Its peaks by cause are those of the rank with least to spare."""
    tightest = min(places, key=lambda place: min(spare_bytes(memory_of(task, setting, place), place)))
    seconds = max((seconds_of(task, setting, place) for place in places), key=lambda s: s.total)
    return Forecast(name, memory_of(task, setting, tightest), seconds, tightest)


# ---------------------------------------------------------------------------------------------------- where nothing fits

def refusal(task: Task, places: Places) -> PlanError:
    """The error that says what lacks, and every single change that would do, the one that costs least first."""
    everywhere = [place for group in places.values() for place in group]
    short = shortage(task, _frugal(task, everywhere), everywhere)
    changes = list(_changes(task, places))
    lines = "".join(f"\n  - {change.text}" for change in changes)
    return PlanError(f"{task.shape.name} with {task.rows} rows of {task.tokens} tokens does not fit in any tier: {short}. Each of these would do:{lines}",
                     changes)


def apply(change: Change, task: Task, nodes: Mapping[str, Node]) -> tuple[Task, dict[str, Node]]:
    """The same task and nodes after a change."""
    nodes = dict(nodes)
    for part in change.value if change.key == "both" else [change]:
        if part.key == "train.micro_batch":
            task = replace(task, micro_batch=int(part.value))
        elif part.key == "data.max_tokens":
            task = replace(task, tokens=int(part.value))
        elif part.key == "quantised":
            task = replace(task, quantised=True)
        elif part.key == "model.dtype":
            task = replace(task, dtype=str(part.value))
        else:
            nodes = {name: _grown(node, part) for name, node in nodes.items()}
    return task, nodes


def _grown(node: Node, change: Change) -> Node:
    if change.key == "gpu_gib":
        if node.device.kind == "cpu":
            return node
        return replace(node, device=replace(node.device, memory=max(node.device.memory, int(change.value * GIB * OF_GPU_MEMORY))))
    if change.key == "ram_gib":
        return replace(node, ram=max(node.ram, int(change.value * GIB) - RAM_KEPT))
    return replace(node, nvme=max(node.nvme, int(change.value * GIB)))


def possible(task: Task, places: Sequence[Place]) -> bool:
    """Whether any setting fits: the least demanding ones tell."""
    return any(fewest_resident(task, setting, places) for setting in _frugal(task, places))


def _frugal(task: Task, places: Sequence[Place]) -> list[Setting]:
    """Of every family the settings that take least; of what is traded (block inputs in one memory or the other) both."""
    return _most_frugal(list(families(task, places)))


def _most_frugal(settings: Sequence[Setting]) -> list[Setting]:
    """Those with the smallest micro-batch and fewest seats of their tier."""
    def demand(setting: Setting) -> tuple[int, int]:
        return setting.micro_batch, setting.seats

    least = {tier: min(demand(setting) for setting in settings if setting.tier == tier) for tier in {setting.tier for setting in settings}}
    return [setting for setting in settings if demand(setting) == least[setting.tier]]


def _changes(task: Task, places: Places) -> Iterator[Change]:
    everywhere = [place for group in places.values() for place in group]

    def does(changed: Task, *parts: Change) -> bool:
        grown = [replace(place, node=_with(place.node, parts)) for place in everywhere]
        return possible(changed, grown)

    if task.micro_batch and task.micro_batch > 1:
        fitting = [m for m in range(task.micro_batch - 1, 0, -1) if task.rows % m == 0 and does(replace(task, micro_batch=m))]
        if fitting:
            yield Change("train.micro_batch", fitting[0], f"train.micro_batch={fitting[0]} with train.accumulation={task.rows // fitting[0]} (the same step)")
    if task.dtype == "fp32":
        for dtype in ("bf16", "fp16"):
            if all(dtype in place.node.device.flops for place in everywhere) and does(replace(task, dtype=dtype)):
                yield Change("model.dtype", dtype, f"model.dtype={dtype}, 2 bytes a number instead of 4")
                break
    if not task.quantised and does(replace(task, quantised=True)):
        yield Change("quantised", True, "a base in 8 or 4 bits, which gives other losses (fedspeed plan --quantised; engine.tier=int8 or nf4)")
    tokens = _largest(lambda n: does(replace(task, tokens=n * TOKENS_STEP)), task.tokens // TOKENS_STEP)
    if tokens:
        yield Change("data.max_tokens", tokens * TOKENS_STEP, f"data.max_tokens={tokens * TOKENS_STEP}")
    gpu, ram, nvme = _of_gpu(does, task), _of_ram(does, task), _of_nvme(does, task)
    yield from filter(None, (gpu, ram, nvme))
    if not (gpu or ram):
        unlimited = Change("ram_gib", 1 << 20, "")
        most = _of_gpu(lambda changed, *parts: does(changed, unlimited, *parts), task) or Change("gpu_gib", 0.0, "the same cards")
        size = _of_ram(lambda changed, *parts: does(changed, most, *parts), task)
        if size:
            yield Change("both", (most, size), f"{most.text} together with {size.text}")


def _with(node: Node, parts: Sequence[Change]) -> Node:
    for part in parts:
        node = _grown(node, part)
    return node


def _of_gpu(does, task: Task) -> Change | None:
    """The least that cards must have, in tenths of a GiB."""
    tenths = _smallest(lambda n: does(task, Change("gpu_gib", n / 10, "")), 1 << 14)
    return Change("gpu_gib", tenths / 10, f"cards with {tenths / 10:.1f} GiB (gpu_mem_gib={tenths / 10:.1f} in the hostfile)") if tenths else None


def _of_ram(does, task: Task) -> Change | None:
    size = _smallest(lambda n: does(task, Change("ram_gib", n, "")), 1 << 14)
    return Change("ram_gib", size, f"hosts with {size} GiB RAM (ram_gib={size} in the hostfile)") if size else None


def _of_nvme(does, task: Task) -> Change | None:
    size = _smallest(lambda n: does(task, Change("nvme", n, "")), 1 << 14)
    return Change("nvme", size, f"{size} GiB of NVMe on every host (nvme=/FOLDER in the hostfile)") if size else None


def _smallest(does, most: int) -> int | None:
    """The smallest number of 1 to `most` for which `does` holds, None if it holds for none. It must hold from some number on."""
    return _least(1, most, does) if does(most) else None


def _least(low: int, high: int, does: Callable[[int], bool]) -> int:
    """Find the smallest number of `low` to `high` for which `does` holds. It must hold from some number on,
    and for `high`."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if does(middle) else (middle + 1, high)
    return high


def _largest(does, below: int) -> int | None:
    """The largest number of 1 to `below` for which `does` holds. It must hold up to some number."""
    if below < 1 or not does(1):
        return None
    low, high = 1, below
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if does(middle) else (low, middle - 1)
    return low
