"""Peak bytes of each baseline's device and node. Pure; the planner's model of memory, and what it lacks."""

from dataclasses import dataclass, replace

from fedspeed.planner.hardware import GIB
from fedspeed.planner.memory import memory_of, sizes
from fedspeed.planner.plan import Memory, RankProfile, Setting, Task

GATHERED_BLOCKS = 2  # of stock ZeRO-3 at a time: the one in use, and the next one on its way


@dataclass(frozen=True)
class Need:
    """What a rank needs and has, in bytes: device memory, and its node's RAM."""

    device: int
    device_has: int
    ram: int
    ram_has: int

    @property
    def fits(self) -> bool:
        """Return whether both are enough."""
        return self.device <= self.device_has and self.ram <= self.ram_has

    @property
    def shortage(self) -> str:
        """Return what does not fit, and what it would need; empty: it fits."""
        if self.device > self.device_has:
            return f"needs {self.device / GIB:.1f} GiB of {self.device_has / GIB:.1f} on the device"
        if self.ram > self.ram_has:
            return f"needs {self.ram / GIB:.1f} GiB of {self.ram_has / GIB:.1f} of RAM"
        return ""


def need_of(memory: Memory, rank: RankProfile) -> Need:
    """Return what is needed beside what a rank has."""
    return Need(memory.gpu_bytes, rank.node.device.memory, memory.ram_bytes, rank.node.ram)


def resident(task: Task, setting: Setting, rank: RankProfile) -> Memory:
    """Return the memory of a base on the device."""
    return memory_of(task, setting, rank)


def optimizer_on_host(task: Task, setting: Setting, rank: RankProfile) -> Memory:
    """Return the memory with masters and moments in the node's RAM instead."""
    memory = memory_of(task, setting, rank)
    moved = memory.gpu["masters and optimizer"]
    device = {cause: count for cause, count in memory.gpu.items() if cause != "masters and optimizer"}
    return replace(memory, gpu=device, ram=memory.ram | {"optimizer": moved * rank.ranks_here})


def offloaded(task: Task, setting: Setting, rank: RankProfile) -> Memory:
    """Return the memory of stock ZeRO-3 with offloaded parameters: of the base only what is gathered at a
    time, GATHERED_BLOCKS blocks and the larger of embedding and head. DeepSpeed may gather more ahead.
    """
    memory = optimizer_on_host(task, setting, rank)
    unit = sizes(task.shape, task.type_bytes)
    gathered = GATHERED_BLOCKS * unit.block + max(unit.embedding, unit.head)
    base = task.shape.layers * unit.block + unit.embedding_and_head
    return replace(memory, gpu=memory.gpu | {"base": gathered}, ram=memory.ram | {"base": base})


def alignment(task: Task, setting: Setting, server: RankProfile) -> Memory:
    """Return the memory of FedBiOT's server: the whole base, activations of the blocks that it trains, and
    the logits of the teacher beside those of the student, in the model's type.

    Args:
        task: of the server, from `Method.planned`.
    """
    memory = memory_of(replace(task, differentiated_blocks=task.adapted_blocks), setting, server)
    logits = setting.micro_batch * task.tokens * task.shape.vocab * task.type_bytes
    return replace(memory, gpu=memory.gpu | {"teacher's logits": logits})
