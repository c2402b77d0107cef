"""Which settings there are, which of them fit, and what the others lack. Pure.

What is tried does not depend on the memory there is, so that more memory never gives a slower plan.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from fedspeed.planner.hardware import GIB
from fedspeed.planner.memory import kept_bytes, memory_of
from fedspeed.planner.plan import SLOTTED, STREAMED, Memory, Place, Setting, Task
from fedspeed.schedule.limits import QUANTISED


def families(task: Task, places: Sequence[Place]) -> Iterator[Setting]:
    """Every setting to be weighed, with one slot, no block resident and no activations kept: `grown` finds
    how many fit.
    """
    carried = max(place.carried for place in places)
    gpu = any(place.node.device.kind == "gpu" for place in places)
    for micro in (
        [task.micro_batch] if task.micro_batch else [m for m in range(task.rows, 0, -1) if task.rows % m == 0]
    ):
        steps = task.rows // micro
        for checkpointing in (False, True):
            yield Setting(
                "stock", micro, steps, block_slots=0, block_inputs="device", checkpointing=checkpointing
            )
        if task.method == "full":
            continue
        for inputs in ("device", "host") if gpu else ("device",):
            for client_slots in sorted({carried, -(-carried // 2), 1}, reverse=True):
                yield Setting(
                    "resident", micro, steps, block_slots=0, client_slots=client_slots, block_inputs=inputs
                )
                for tier in SLOTTED if task.quantised else STREAMED:
                    if tier == "client" and all(place.client_ranks == 1 for place in places):
                        continue  # a client of one rank would hold all of it, and slots besides
                    yield Setting(
                        tier,
                        micro,
                        steps,
                        resident_blocks=0,
                        block_slots=1,
                        client_slots=client_slots,
                        block_inputs=inputs,
                    )


def grown(task: Task, family: Setting, places: Sequence[Place]) -> Iterator[Setting]:
    """Every way to spend spare device memory on a family that fits: each number of slots, with as many kept
    activations as fit beside them.

    Blocks are resident only where host memory or disk has no room for their copy: slots are worth more for
    the same bytes. Quantised tiers are the other way round, since a block that is resident has no copy in
    fewer bits.
    """
    base = fewest_resident(task, family, places)
    if base is None:
        return
    if family.tier in QUANTISED:
        spent = [replace(base, resident_blocks=resident) for resident in range(task.shape.layers)]
    elif family.tier in STREAMED:
        spent = [
            replace(base, block_slots=slots)
            for slots in range(1, task.shape.layers - base.resident_blocks + 1)
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
    return min(setting.client_slots, place.carried) * setting.accumulation


def _lacking(task: Task, setting: Setting, place: Place) -> int:
    """Bytes that are lacking where a rank computes; negative: so many are spare."""
    spare = spare_bytes(memory_of(task, setting, place), place)
    return -(spare[0] if place.node.device.kind == "gpu" else spare[1])


def spare_bytes(memory: Memory, place: Place) -> tuple[int, int, int]:
    """GPU, RAM and NVMe bytes left over; negative: so many are lacking."""
    return (
        place.node.device.memory - memory.gpu_bytes,
        place.node.ram - memory.ram_bytes,
        place.node.nvme - memory.nvme_bytes,
    )


def fits(task: Task, setting: Setting, place: Place) -> bool:
    return min(spare_bytes(memory_of(task, setting, place), place)) >= 0


def possible(task: Task, places: Sequence[Place]) -> bool:
    """Whether any setting fits: the least demanding ones tell."""
    return any(fewest_resident(task, setting, places) for setting in frugal(task, places))


def frugal(task: Task, places: Sequence[Place]) -> list[Setting]:
    """Of every family the settings that take least; of what is traded (block inputs in one memory or the
    other) both.
    """
    return most_frugal(list(families(task, places)))


def most_frugal(settings: Sequence[Setting]) -> list[Setting]:
    """Those with the smallest micro-batch and fewest client slots of their tier."""

    def demand(setting: Setting) -> tuple[int, int]:
        return setting.micro_batch, setting.client_slots

    least = {
        tier: min(demand(setting) for setting in settings if setting.tier == tier)
        for tier in {setting.tier for setting in settings}
    }
    return [setting for setting in settings if demand(setting) == least[setting.tier]]


def shortage(task: Task, settings: Sequence[Setting], places: Sequence[Place]) -> str:
    """What the least demanding of some settings lacks where it lacks most, in words with numbers; with as
    many resident blocks as lack least.
    """
    lacks = []
    for setting in settings:
        most = task.shape.layers - 1 if setting.tier in SLOTTED else 0
        if setting.tier == "nvme" and not all(place.node.nvme for place in places):
            most = 0  # resident blocks are no cure for a disk that is not there
        for resident in range(max(0, most) + 1):
            chosen = replace(setting, resident_blocks=resident)
            lacks.append(max((lack(task, chosen, place) for place in places), key=lambda pair: pair[0]))
    return min(lacks, key=lambda pair: pair[0])[1]


def lack(task: Task, setting: Setting, place: Place) -> tuple[int, str]:
    """(bytes lacking in all, what lacks)."""
    memory = memory_of(task, setting, place)
    needs = (memory.gpu_bytes, memory.ram_bytes, memory.nvme_bytes)
    words = []
    total = 0
    for name, need, spare in zip(("GPU memory", "RAM", "NVMe"), needs, spare_bytes(memory, place)):
        if spare < 0:
            total -= spare
            had = (
                f"{(need + spare) / GIB:.1f} to be had"
                if need + spare
                else "the hostfile names 0 folders (nvme=)"
            )
            words.append(f"{need / GIB:.1f} GiB of {name} needed, {had}")
    where = f" with {setting.resident_blocks} blocks resident" if setting.resident_blocks else ""
    return total, f"{' and '.join(words)} (on {place.node.device.name}{where})"
