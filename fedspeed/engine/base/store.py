"""The frozen base of one rank: units stored in tiers, slots on the device, and prefetching."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.distributed import ProcessGroup

from fedspeed.engine.base.layout import Unit
from fedspeed.engine.base.tier import LoadHandle, Tier
from fedspeed.engine.base.wait_timer import WaitTimer
from fedspeed.engine.clock import Clock
from fedspeed.engine.device_events import DeviceEvent, event_after_queued_work
from fedspeed.errors import LostPeerError
from fedspeed.schedule.limits import UNIT_ALIGN
from fedspeed.schedule.loads import next_load

EMPTY = torch.empty(0)


@dataclass
class LoadStats:
    """Count the loads since the last `take_loads`: bytes by tier, number of loads, and seconds that the
    computation waited for them.
    """

    bytes: dict[str, int] = field(default_factory=dict)
    count: int = 0
    waited_s: float = 0.0


class SlotPool:
    """Slots on the device that units of about one size share.

    Attributes:
        memory: unit -> its slot.
        handles: unit -> its load, while it is in progress.
        read_until: address of a slot -> the event after which nothing reads its content.
        busy: units in use.
    """

    def __init__(self, slot_bytes: int, slots: int):
        device = get_accelerator().current_device_name()
        self._free = [_aligned(slot_bytes, device) for _ in range(slots)]
        self.slots = slots
        self.nbytes = slots * slot_bytes
        self.memory: dict[int, torch.Tensor] = {}
        self.handles: dict[int, LoadHandle] = {}
        self.read_until: dict[int, DeviceEvent] = {}
        self.busy: set[int] = set()
        for slot in self._free:  # the memory may have belonged to a tensor that queued work still reads
            self.note_read(slot)

    def note_read(self, slot: torch.Tensor) -> None:
        """Let the next load into a slot wait until the work queued so far is done."""
        if not get_accelerator().is_synchronized_device():
            self.read_until[slot.data_ptr()] = event_after_queued_work()

    def take(self, unit: int, victim: int | None) -> torch.Tensor:
        """Give a unit the slot of another one (`victim`), or a free slot."""
        self.memory[unit] = self._free.pop() if victim is None else self.memory.pop(victim)
        return self.memory[unit]


class BaseStore:
    """Provide the frozen parameters of one rank, unit by unit, and prefetch the next ones.

    Call `seal` first. Before each pass over the model call `begin(sequence)`, then use the units in that
    sequence inside `with use(unit)`.

    Args:
        tier_of: the tier of each unit, by its number; all units have been put.
        parameters: the model's parameters by name. Their `data` is bound to a slot while a unit is in use,
            and empty otherwise.
        block_units: numbers of the decoder blocks. The other units (embedding, head) share one slot.
        slots: slots for decoder blocks.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        tier_of: Sequence[Tier],
        parameters: Mapping[str, nn.Parameter],
        block_units: set[int],
        slots: int,
        *,
        clock: Clock,
    ):
        self.units = units
        self._tier_of = tier_of
        self._clock = clock
        self._parameters = [[(parameters[t.name], t) for t in unit.tensors] for unit in units]
        streamed = [i for i in range(len(units)) if tier_of[i].resident(i) is None]
        blocks = [i for i in streamed if i in block_units]
        others = [i for i in streamed if i not in block_units]
        self._pools: list[SlotPool] = []
        self._pool_of: dict[int, SlotPool] = {}
        for members, number in ((blocks, slots), (others, 1)):
            if members:
                pool = SlotPool(max(self._slot_bytes(i) for i in members), min(number, len(members)))
                self._pools.append(pool)
                self._pool_of.update(dict.fromkeys(members, pool))
        self._tiers = list(dict.fromkeys(tier_of))  # in the same order on all ranks
        self._upcoming: list[int] = []
        self._loads = LoadStats()
        self._waits = WaitTimer()

    def _slot_bytes(self, index: int) -> int:
        return self._tier_of[index].slot_bytes(self.units[index])

    @property
    def slot_bytes(self) -> int:
        """Bytes of all slots on the device."""
        return sum(pool.nbytes for pool in self._pools)

    @property
    def matched_group(self) -> ProcessGroup | None:
        """The ranks that must load units in the same order; None if every rank loads independently."""
        return next((tier.matched_group for tier in self._tier_of if tier.matched_group is not None), None)

    def seal(self) -> None:
        """Finish writing: from here on units are only read. Collective over the ranks that share a tier."""
        for tier in self._tiers:
            tier.seal()
        for index in range(len(self.units)):
            resident = self._tier_of[index].resident(index)
            if resident is not None:
                self._bind(index, resident)
            else:
                self._unbind(index)

    def rows(self, index: int, name: str) -> torch.Tensor | None:
        """Return a parameter of a unit if single rows of it can be read without loading the unit, else
        None.
        """
        tier = self._tier_of[index]
        unit = self.units[index]
        tensor = next(t for t in unit.tensors if t.name == name)
        memory = tier.resident(index)
        memory = tier.host(index) if memory is None else memory
        return None if memory is None else unit.view(memory, tensor)

    def begin(self, sequence: list[int]) -> None:
        """Announce the units that will be used from now on, in order. As many of them are prefetched as there
        are slots.
        """
        self._upcoming = [i for i in sequence if i in self._pool_of]
        self._load_ahead()

    @contextmanager
    def use(self, index: int) -> Iterator[None]:
        """Bind the unit's parameters to their values inside. It must be the next unit announced."""
        pool = self._pool_of.get(index)
        if pool is None:
            yield
            return
        assert self._upcoming and self._upcoming[0] == index, (
            f"unit {index} used, {self._upcoming[:1]} announced"
        )
        self._load_ahead()
        self._upcoming.pop(0)
        pool.busy.add(index)
        self._load_ahead()
        if index in pool.handles:
            with self._clock.stage("gather"), self._waits.timed():
                nbytes = pool.handles.pop(index).wait()
            self._count(index, nbytes)
        self._bind(index, pool.memory[index])
        try:
            yield
        finally:
            self._unbind(index)
            pool.busy.discard(index)
            pool.note_read(pool.memory[index])
            self._load_ahead()

    def address(self, index: int) -> int:
        """Return the device address of a unit in use; 0 if the unit is resident.

        A block that a step loads again for its backward pass returns to the same slot, because the backward
        pass reverses the evictions of the forward pass (tests/engine/test_base_store.py). So an autograd
        graph that was built in the forward pass finds the weights where they were.
        """
        pool = self._pool_of.get(index)
        return 0 if pool is None else pool.memory[index].data_ptr()

    def away(self) -> list[torch.Tensor]:
        """Return the host memory that stores units."""
        return [tensor for tier in self._tiers for tensor in tier.away()]

    def take_loads(self) -> LoadStats:
        """Return what was loaded since the last call. Waits for the device, to measure how long it waited."""
        taken = self._loads
        self._loads = LoadStats()
        taken.waited_s = self._waits.take()
        return taken

    def close(self) -> None:
        """Wait for the loads in progress, then release all memory."""
        try:
            for pool in self._pools:
                for handle in pool.handles.values():
                    with suppress(LostPeerError):  # another rank may have closed its store already
                        handle.wait()
                pool.handles.clear()
        finally:
            for tier in self._tiers:
                tier.close()
        for index in range(len(self.units)):
            self._unbind(index)
        self._pools.clear()
        self._pool_of.clear()

    def _bind(self, index: int, data: torch.Tensor) -> None:
        for parameter, tensor in self._parameters[index]:
            parameter.data = self.units[index].view(data, tensor)

    def _unbind(self, index: int) -> None:
        for parameter, _ in self._parameters[index]:
            parameter.data = EMPTY.to(parameter.dtype)

    def _load_ahead(self) -> None:
        for pool in self._pools:
            order = [i for i in self._upcoming if self._pool_of[i] is pool]
            while choice := next_load(order, pool.memory.keys(), pool.busy, pool.slots):
                index, victim = choice
                if (
                    victim is not None and victim in pool.handles
                ):  # prefetched but not used; its slot is free once the load has ended
                    self._count(victim, pool.handles.pop(victim).wait())
                slot = pool.take(index, victim)
                pool.handles[index] = self._tier_of[index].fetch(
                    index, slot[: self._slot_bytes(index)], pool.read_until.get(slot.data_ptr())
                )

    def _count(self, index: int, nbytes: int) -> None:
        name = self._tier_of[index].name
        self._loads.bytes[name] = self._loads.bytes.get(name, 0) + nbytes
        self._loads.count += 1


def _aligned(nbytes: int, device: str) -> torch.Tensor:
    """Allocate [nbytes] uint8 at an aligned address."""
    whole = torch.empty(nbytes + UNIT_ALIGN, dtype=torch.uint8, device=device)
    start = -whole.data_ptr() % UNIT_ALIGN
    return whole[start : start + nbytes]
