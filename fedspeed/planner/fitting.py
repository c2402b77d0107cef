"""The settings that the planner considers, which of them fit, and how much memory the others lack. Pure.

The candidates do not depend on the available memory, so that more memory never gives a slower plan.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from fedspeed.planner.hardware import GIB
from fedspeed.planner.memory import input_bytes, kept_bytes, memory_of
from fedspeed.planner.plan import SLOTTED, STREAMED, Memory, RankProfile, Setting, Task
from fedspeed.schedule.limits import QUANTISED


def candidates(task: Task, profiles: Sequence[RankProfile]) -> Iterator[Setting]:
    """Yield every combination of tier, micro-batch, client slots and memory for block inputs.

    A candidate has one block slot, no resident block and no kept activations: `variants` finds out how many
    of these fit.
    """
    if task.micro_batch:
        sizes = [task.micro_batch]
    else:
        sizes = [size for size in range(task.rows, 0, -1) if task.rows % size == 0]
    for micro_batch in sizes:
        for checkpointing in (False, True):
            yield Setting(
                "stock",
                micro_batch,
                task.rows // micro_batch,
                block_slots=0,
                block_inputs="device",
                checkpointing=checkpointing,
            )
        if task.method != "full":
            yield from _layer_major_candidates(task, profiles, micro_batch)


def _layer_major_candidates(
    task: Task, profiles: Sequence[RankProfile], micro_batch: int
) -> Iterator[Setting]:
    carried = max(profile.carried for profile in profiles)
    gpu = any(profile.node.device.kind == "gpu" for profile in profiles)
    accumulation = task.rows // micro_batch
    for block_inputs in ("device", "host") if gpu else ("device",):
        for client_slots in sorted({carried, -(-carried // 2), 1}, reverse=True):
            resident = Setting(
                "resident",
                micro_batch,
                accumulation,
                block_slots=0,
                client_slots=client_slots,
                block_inputs=block_inputs,
            )
            yield resident
            for tier in SLOTTED if task.quantised else STREAMED:
                if tier == "client" and all(profile.client_ranks == 1 for profile in profiles):
                    continue  # the one rank would store the whole base, and the slots in addition
                yield replace(resident, tier=tier, block_slots=1)


def variants(task: Task, candidate: Setting, profiles: Sequence[RankProfile]) -> Iterator[Setting]:
    """Yield the variants of a candidate that fit: each number of block slots, with as many kept activations
    as fit besides.

    Blocks are resident only where host memory or disk has no room for their copy: slots save more time for
    the same bytes. In quantised tiers the number of resident blocks varies instead, since a resident block
    has no copy in fewer bits.
    """
    base = fewest_resident(task, candidate, profiles)
    if base is None:
        return
    layers = task.shape.layers
    settings = [base]
    if candidate.tier in QUANTISED:
        settings = [replace(base, resident_blocks=resident) for resident in range(layers)]
    elif candidate.tier in STREAMED:
        most = layers - base.resident_blocks
        settings = [replace(base, block_slots=slots) for slots in range(1, most + 1)]
    for setting in settings:
        if not fits_everywhere(task, setting, profiles):
            return
        yield setting if setting.tier == "stock" else with_kept_activations(task, setting, profiles)


def fewest_resident(task: Task, candidate: Setting, profiles: Sequence[RankProfile]) -> Setting | None:
    """Return a candidate with the fewest resident blocks with which it fits, or None if it does not fit.

    Each resident block takes the same number of bytes on the device and frees the same number in host memory
    or on disk, so that the shortage there gives the number of blocks.
    """
    fewest = 0
    if candidate.tier in STREAMED:
        for profile in profiles:
            none, one = (memory_of(task, replace(candidate, resident_blocks=r), profile) for r in (0, 1))
            _, spare_ram, spare_nvme = spare_bytes(none, profile)
            for lacking, freed in (
                (-spare_ram, none.ram_bytes - one.ram_bytes),
                (-spare_nvme, none.nvme_bytes - one.nvme_bytes),
            ):
                if lacking > 0 and freed > 0:
                    fewest = max(fewest, -(-lacking // freed))
    # A rank's share of a divided base is rounded up, so that one block more may be needed.
    numbers = [r for r in (fewest, fewest + 1) if r == 0 or r < task.shape.layers]
    settings = (replace(candidate, resident_blocks=r) for r in numbers)
    return next((setting for setting in settings if fits_everywhere(task, setting, profiles)), None)


def with_kept_activations(task: Task, setting: Setting, profiles: Sequence[RankProfile]) -> Setting:
    """Return a setting with the largest activation budget that fits on all profiles, in whole pairs of a
    block and a micro-batch.
    """
    one = kept_bytes(task, setting)
    most = min(_micro_batches(setting, profile) for profile in profiles) * (task.shape.layers - 1)
    for profile in profiles:
        # The transient peak is the larger of two sums, so beyond some number each pair adds the same bytes.
        lacking = _device_shortage(task, replace(setting, activation_bytes=most * one), profile)
        if lacking > 0:
            fewer = replace(setting, activation_bytes=(most - 1) * one)
            each = lacking - _device_shortage(task, fewer, profile)
            most = max(0, most - -(-lacking // each)) if each > 0 else 0
    while most and not fits_everywhere(task, replace(setting, activation_bytes=most * one), profiles):
        most -= 1  # bytes are rounded
    return replace(setting, activation_bytes=most * one)


def with_activations(
    task: Task,
    setting: Setting,
    profiles: Sequence[RankProfile],
    *,
    block_inputs: str,
    activation_gib: float | str,
) -> Setting:
    """Return a setting with where block inputs and activations are stored until the backward pass.

    Args:
        block_inputs, activation_gib: of the run's engine section. With activation_gib=auto it is as much as
            the memory model has room for.
    """
    if setting.tier == "stock":
        return setting
    is_auto = block_inputs == "auto"
    if isinstance(activation_gib, str):
        if is_auto and not fits_everywhere(task, setting, profiles):
            setting = replace(setting, block_inputs="host")
        return with_kept_activations(task, setting, profiles)
    budget = int(activation_gib * GIB)
    if not is_auto:
        return replace(setting, activation_bytes=budget)
    micro_batches = max(_micro_batches(setting, profile) for profile in profiles)
    inputs = micro_batches * (task.shape.layers - 1) * input_bytes(task, setting)
    on_card = any(profile.node.device.kind == "gpu" for profile in profiles)
    if inputs > budget and on_card:
        return replace(setting, block_inputs="host", activation_bytes=budget)
    return replace(setting, activation_bytes=max(0, budget - inputs))


def _micro_batches(setting: Setting, profile: RankProfile) -> int:
    return min(setting.client_slots, profile.carried) * setting.accumulation


def _device_shortage(task: Task, setting: Setting, profile: RankProfile) -> int:
    """Return the bytes lacking in the memory that a rank computes in; negative: so many are spare."""
    gpu, ram, _ = spare_bytes(memory_of(task, setting, profile), profile)
    return -(gpu if profile.node.device.kind == "gpu" else ram)


def spare_bytes(memory: Memory, profile: RankProfile) -> tuple[int, int, int]:
    """Return the GPU, RAM and NVMe bytes left over; negative: so many are lacking."""
    return (
        profile.node.device.memory - memory.gpu_bytes,
        profile.node.ram - memory.ram_bytes,
        profile.node.nvme - memory.nvme_bytes,
    )


def fits(task: Task, setting: Setting, profile: RankProfile) -> bool:
    """Tell whether a setting fits in all memories of a profile."""
    return min(spare_bytes(memory_of(task, setting, profile), profile)) >= 0


def fits_everywhere(task: Task, setting: Setting, profiles: Sequence[RankProfile]) -> bool:
    """Tell whether a setting fits on all profiles."""
    return all(fits(task, setting, profile) for profile in profiles)


def any_fits(task: Task, profiles: Sequence[RankProfile]) -> bool:
    """Tell whether any setting fits on all profiles; the least demanding ones decide."""
    return any(fewest_resident(task, setting, profiles) for setting in least_demanding(task, profiles))


def least_demanding(task: Task, profiles: Sequence[RankProfile]) -> list[Setting]:
    """Return the candidates of every tier that need least memory. Where one memory is traded for another
    (block inputs on the device or the host), both are returned.
    """
    return least_demanding_of(list(candidates(task, profiles)))


def least_demanding_of(settings: Sequence[Setting]) -> list[Setting]:
    """Return the settings with the smallest micro-batch and the fewest client slots of their tier."""

    def demand(setting: Setting) -> tuple[int, int]:
        return setting.micro_batch, setting.client_slots

    least = {
        tier: min(demand(setting) for setting in settings if setting.tier == tier)
        for tier in {setting.tier for setting in settings}
    }
    return [setting for setting in settings if demand(setting) == least[setting.tier]]


def describe_shortage(task: Task, settings: Sequence[Setting], profiles: Sequence[RankProfile]) -> str:
    """Describe, with numbers, what the setting with the smallest shortage lacks on its worst profile.

    Each setting is tried with every number of resident blocks.
    """
    shortages = []
    for setting in settings:
        most = task.shape.layers - 1 if setting.tier in SLOTTED else 0
        if setting.tier == "nvme" and not all(profile.node.nvme for profile in profiles):
            most = 0  # resident blocks do not make up for a disk that is not there
        for resident in range(max(0, most) + 1):
            shortages.append(worst_shortage(task, replace(setting, resident_blocks=resident), profiles))
    return min(shortages, key=lambda pair: pair[0])[1]


def worst_shortage(task: Task, setting: Setting, profiles: Sequence[RankProfile]) -> tuple[int, str]:
    """Return (bytes lacking, description) of the profile where a setting lacks most."""
    return max((_shortage(task, setting, profile) for profile in profiles), key=lambda pair: pair[0])


def _shortage(task: Task, setting: Setting, profile: RankProfile) -> tuple[int, str]:
    memory = memory_of(task, setting, profile)
    needs = (memory.gpu_bytes, memory.ram_bytes, memory.nvme_bytes)
    phrases = []
    total = 0
    for name, need, spare in zip(("GPU memory", "RAM", "NVMe"), needs, spare_bytes(memory, profile)):
        if spare < 0:
            total -= spare
            available = (
                f"{(need + spare) / GIB:.1f} available"
                if need + spare
                else "the hostfile names 0 folders (nvme=)"
            )
            phrases.append(f"{need / GIB:.1f} GiB of {name} needed, {available}")
    resident = f" with {setting.resident_blocks} blocks resident" if setting.resident_blocks else ""
    return total, f"{' and '.join(phrases)} (on {profile.node.device.name}{resident})"
