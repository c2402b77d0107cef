"""The changes to a task or its hosts that would make it fit, where nothing fits. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from fedspeed.errors import PlanError
from fedspeed.planner.bisection import largest_up_to, smallest_up_to
from fedspeed.planner.fitting import any_fits, describe_shortage, least_demanding
from fedspeed.planner.hardware import GIB, GPU_MEMORY_SHARE, RAM_RESERVED, Node
from fedspeed.planner.plan import RankProfile, Task
from fedspeed.planner.profiles import Profiles

LENGTH_MULTIPLE = 8  # sequence lengths are padded to multiples of it
MAX_GIB = 1 << 14  # of RAM or NVMe that is proposed; of GPU memory in tenths


@dataclass(frozen=True)
class Change:
    """One change that makes a task fit.

    Attributes:
        key: a configuration key; or quantised (allow a base in 8 or 4 bits), gpu_gib (nominal size of each
            card), ram_gib (total RAM of each host), nvme (GiB on each host); or both, for two changes.
        value: the new value; for both, the two changes.
        text: the change as the user reads it.
    """

    key: str
    value: float | str | bool | tuple["Change", "Change"]
    text: str


class FitsWith(Protocol):
    """Tell whether a task fits after changes to its hosts."""

    def __call__(self, task: Task, /, *changes: Change) -> bool: ...


def refusal(task: Task, profiles: Profiles) -> PlanError:
    """Return the error that says what is lacking and lists every single change that would be enough, the
    cheapest first.
    """
    everywhere = [profile for group in profiles.values() for profile in group]
    shortage = describe_shortage(task, least_demanding(task, everywhere), everywhere)
    changes = list(_changes(task, everywhere))
    lines = "".join(f"\n  - {change.text}" for change in changes)
    return PlanError(
        f"{task.shape.name} with {task.rows} rows of {task.tokens} tokens does not fit in any tier: "
        f"{shortage}. Each of these would do:{lines}",
        changes,
    )


def with_memory(node: Node, change: Change) -> Node:
    """Return a node with at least the memory that a change names."""
    assert isinstance(change.value, int | float), "a change of memory has a size"
    nbytes = int(change.value * GIB)
    if change.key == "gpu_gib":
        if node.device.kind == "cpu":
            return node
        memory = max(node.device.memory, int(change.value * GIB * GPU_MEMORY_SHARE))
        return replace(node, device=replace(node.device, memory=memory))
    if change.key == "ram_gib":
        return replace(node, ram=max(node.ram, nbytes - RAM_RESERVED))
    return replace(node, nvme=max(node.nvme, nbytes))


def _changes(task: Task, everywhere: Sequence[RankProfile]) -> Iterator[Change]:
    """Yield the changes that make a task fit on profiles where it does not."""

    def fits_with(changed: Task, /, *changes: Change) -> bool:
        return any_fits(
            changed, [replace(profile, node=_changed(profile.node, changes)) for profile in everywhere]
        )

    yield from _changes_of_task(task, everywhere, fits_with)
    gpu = _gpu_change(fits_with, task)
    ram = _ram_change(fits_with, task)
    yield from filter(None, (gpu, ram, _nvme_change(fits_with, task)))
    if not (gpu or ram):
        yield from _gpu_and_ram_change(fits_with, task)


def _changes_of_task(task: Task, everywhere: Sequence[RankProfile], fits_with: FitsWith) -> Iterator[Change]:
    """Yield the changes that need no other hosts."""
    if task.micro_batch:
        smaller = (size for size in range(task.micro_batch - 1, 0, -1) if task.rows % size == 0)
        micro_batch = next((size for size in smaller if fits_with(replace(task, micro_batch=size))), None)
        if micro_batch:
            yield Change(
                "train.micro_batch",
                micro_batch,
                f"train.micro_batch={micro_batch} with train.accumulation={task.rows // micro_batch} (the "
                "same step)",
            )
    if task.dtype == "fp32":
        for dtype in ("bf16", "fp16"):
            supported = all(dtype in profile.node.device.flops for profile in everywhere)
            if supported and fits_with(replace(task, dtype=dtype)):
                yield Change("model.dtype", dtype, f"model.dtype={dtype}, 2 bytes a number instead of 4")
                break
    if not task.quantised and fits_with(replace(task, quantised=True)):
        yield Change(
            "quantised",
            True,
            "a base in 8 or 4 bits, which gives other losses (fedspeed plan --quantised; engine.tier=int8 "
            "or nf4)",
        )
    multiples = largest_up_to(
        task.tokens // LENGTH_MULTIPLE, lambda n: fits_with(replace(task, tokens=n * LENGTH_MULTIPLE))
    )
    if multiples:
        tokens = multiples * LENGTH_MULTIPLE
        yield Change("data.max_tokens", tokens, f"data.max_tokens={tokens}")


def _gpu_and_ram_change(fits_with: FitsWith, task: Task) -> Iterator[Change]:
    """Yield the change of both memories: the smallest cards with unlimited RAM, then the RAM with these."""
    unlimited = Change("ram_gib", 1 << 20, "")
    gpu = _gpu_change(lambda changed, *changes: fits_with(changed, unlimited, *changes), task)
    gpu = gpu or Change("gpu_gib", 0.0, "the same cards")
    ram = _ram_change(lambda changed, *changes: fits_with(changed, gpu, *changes), task)
    if ram:
        yield Change("both", (gpu, ram), f"{gpu.text} together with {ram.text}")


def _changed(node: Node, changes: Sequence[Change]) -> Node:
    for change in changes:
        node = with_memory(node, change)
    return node


def _gpu_change(fits_with: FitsWith, task: Task) -> Change | None:
    """Return the smallest sufficient size of the cards, in tenths of a GiB."""
    tenths = smallest_up_to(MAX_GIB, lambda n: fits_with(task, Change("gpu_gib", n / 10, "")))
    if not tenths:
        return None
    gib = tenths / 10
    return Change("gpu_gib", gib, f"cards with {gib:.1f} GiB (gpu_mem_gib={gib:.1f} in the hostfile)")


def _ram_change(fits_with: FitsWith, task: Task) -> Change | None:
    gib = smallest_up_to(MAX_GIB, lambda n: fits_with(task, Change("ram_gib", n, "")))
    return (
        Change("ram_gib", gib, f"hosts with {gib} GiB RAM (ram_gib={gib} in the hostfile)") if gib else None
    )


def _nvme_change(fits_with: FitsWith, task: Task) -> Change | None:
    gib = smallest_up_to(MAX_GIB, lambda n: fits_with(task, Change("nvme", n, "")))
    return (
        Change("nvme", gib, f"{gib} GiB of NVMe on every host (nvme=/FOLDER in the hostfile)")
        if gib
        else None
    )
