"""What would help where nothing fits. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fedspeed.errors import PlanError
from fedspeed.planner.bisection import largest, smallest
from fedspeed.planner.fitting import frugal, possible, shortage
from fedspeed.planner.hardware import GIB, OF_GPU_MEMORY, RAM_KEPT, Node
from fedspeed.planner.places import Places
from fedspeed.planner.plan import Task

TOKENS_STEP = 8  # lengths are padded to multiples of it


@dataclass(frozen=True)
class Change:
    """Something to change so that a task fits.

    Attributes:
        key: a key of a run, or quantised (allow it), gpu_gib (nominal size of each card), ram_gib (whole size
            of each host), nvme (GiB of each host), or both: two changes.
    """

    key: str
    value: float | str | bool | tuple["Change", "Change"]
    text: str


def refusal(task: Task, places: Places) -> PlanError:
    """The error that says what lacks, and every single change that would do, the one that costs least
    first.
    """
    everywhere = [place for group in places.values() for place in group]
    short = shortage(task, frugal(task, everywhere), everywhere)
    changes = list(_changes(task, places))
    lines = "".join(f"\n  - {change.text}" for change in changes)
    return PlanError(
        f"{task.shape.name} with {task.rows} rows of {task.tokens} tokens does not fit in any tier: "
        f"{short}. Each of these would do:{lines}",
        changes,
    )


def grown(node: Node, change: Change) -> Node:
    """Return a host with the memory that a change asks for."""
    if change.key == "gpu_gib":
        if node.device.kind == "cpu":
            return node
        return replace(
            node,
            device=replace(
                node.device, memory=max(node.device.memory, int(change.value * GIB * OF_GPU_MEMORY))
            ),
        )
    if change.key == "ram_gib":
        return replace(node, ram=max(node.ram, int(change.value * GIB) - RAM_KEPT))
    return replace(node, nvme=max(node.nvme, int(change.value * GIB)))


def _changes(task: Task, places: Places) -> Iterator[Change]:
    everywhere = [place for group in places.values() for place in group]

    def does(changed: Task, *parts: Change) -> bool:
        grown = [replace(place, node=_with(place.node, parts)) for place in everywhere]
        return possible(changed, grown)

    if task.micro_batch and task.micro_batch > 1:
        fitting = [
            m
            for m in range(task.micro_batch - 1, 0, -1)
            if task.rows % m == 0 and does(replace(task, micro_batch=m))
        ]
        if fitting:
            yield Change(
                "train.micro_batch",
                fitting[0],
                f"train.micro_batch={fitting[0]} with train.accumulation={task.rows // fitting[0]} (the "
                "same step)",
            )
    if task.dtype == "fp32":
        for dtype in ("bf16", "fp16"):
            if all(dtype in place.node.device.flops for place in everywhere) and does(
                replace(task, dtype=dtype)
            ):
                yield Change("model.dtype", dtype, f"model.dtype={dtype}, 2 bytes a number instead of 4")
                break
    if not task.quantised and does(replace(task, quantised=True)):
        yield Change(
            "quantised",
            True,
            "a base in 8 or 4 bits, which gives other losses (fedspeed plan --quantised; engine.tier=int8 "
            "or nf4)",
        )
    tokens = largest(lambda n: does(replace(task, tokens=n * TOKENS_STEP)), task.tokens // TOKENS_STEP)
    if tokens:
        yield Change("data.max_tokens", tokens * TOKENS_STEP, f"data.max_tokens={tokens * TOKENS_STEP}")
    gpu = _of_gpu(does, task)
    ram = _of_ram(does, task)
    nvme = _of_nvme(does, task)
    yield from filter(None, (gpu, ram, nvme))
    if not (gpu or ram):
        unlimited = Change("ram_gib", 1 << 20, "")
        most = _of_gpu(lambda changed, *parts: does(changed, unlimited, *parts), task) or Change(
            "gpu_gib", 0.0, "the same cards"
        )
        size = _of_ram(lambda changed, *parts: does(changed, most, *parts), task)
        if size:
            yield Change("both", (most, size), f"{most.text} together with {size.text}")


def _with(node: Node, parts: Sequence[Change]) -> Node:
    for part in parts:
        node = grown(node, part)
    return node


def _of_gpu(does, task: Task) -> Change | None:
    """The least that cards must have, in tenths of a GiB."""
    tenths = smallest(lambda n: does(task, Change("gpu_gib", n / 10, "")), 1 << 14)
    return (
        Change(
            "gpu_gib",
            tenths / 10,
            f"cards with {tenths / 10:.1f} GiB (gpu_mem_gib={tenths / 10:.1f} in the hostfile)",
        )
        if tenths
        else None
    )


def _of_ram(does, task: Task) -> Change | None:
    size = smallest(lambda n: does(task, Change("ram_gib", n, "")), 1 << 14)
    return (
        Change("ram_gib", size, f"hosts with {size} GiB RAM (ram_gib={size} in the hostfile)")
        if size
        else None
    )


def _of_nvme(does, task: Task) -> Change | None:
    size = smallest(lambda n: does(task, Change("nvme", n, "")), 1 << 14)
    return (
        Change("nvme", size, f"{size} GiB of NVMe on every host (nvme=/FOLDER in the hostfile)")
        if size
        else None
    )
