"""The frozen base of one rank: units in tiers, a few slots on the device, and loads that run ahead of the
arithmetic.
"""

from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from fedspeed.engine.base.layout import Unit
from fedspeed.engine.base.wait_timer import WaitTimer
from fedspeed.errors import LostPeerError
from fedspeed.schedule.limits import UNIT_ALIGN
from fedspeed.schedule.loads import next_load

EMPTY = torch.empty(0)


@dataclass
class LoadStats:
    """Says what was moved since the last `take_loads`: bytes by tier, number of loads, seconds the arithmetic
    waited for them.
    """

    bytes: dict[str, int] = field(default_factory=dict)
    count: int = 0
    waited_s: float = 0.0


class SlotPool:
    """Units of about one size that share slots on the device."""

    def __init__(self, slot_bytes: int, slots: int):
        device = get_accelerator().current_device_name()
        self._free = [_aligned(slot_bytes, device) for _ in range(slots)]
        self.slots = slots
        self.nbytes = slots * slot_bytes
        self.memory: dict[int, torch.Tensor] = {}  # unit -> its slot
        self.handles: dict[int, object] = {}  # units under way
        self.read_until: dict[int, object] = {}  # data_ptr of a slot -> event after which nothing reads it
        self.busy: set[int] = set()
        for slot in self._free:  # what had its memory before may still be read
            self.note_read(slot)

    def note_read(self, slot: torch.Tensor) -> None:
        """Let the next load into a slot wait until what the arithmetic was asked for so far is done."""
        if not get_accelerator().is_synchronized_device():
            event = get_accelerator().Event()
            event.record(get_accelerator().current_stream())
            self.read_until[slot.data_ptr()] = event

    def take(self, unit: int, victim: int | None) -> torch.Tensor:
        self.memory[unit] = self._free.pop() if victim is None else self.memory.pop(victim)
        return self.memory[unit]


class BaseStore:
    """See the module's docstring.

    Use: `seal`, then for every pass over the model `begin(sequence)` and `with use(unit)` in that sequence.

    Args:
        tier_of: the tier of each unit, by its number; all units have been put.
        parameters: the model's parameters by name, whose `data` is bound to a slot while a unit is in use and
            empty otherwise.
        block_units: numbers of the decoder blocks; the other units (embedding, head) have a slot of their
            own.
    """

    def __init__(
        self,
        units: list[Unit],
        tier_of: list,
        parameters: dict[str, nn.Parameter],
        block_units: set[int],
        slots: int,
        *,
        clock,
    ):
        self.units = units
        self._tier_of = tier_of
        self._clock = clock
        self._parameters = [[(parameters[p.name], p) for p in unit.pieces] for unit in units]
        streamed = [i for i in range(len(units)) if tier_of[i].resident(i) is None]
        blocks = [i for i in streamed if i in block_units]
        ends = [i for i in streamed if i not in block_units]
        self._pools = []
        self._pool_of = {}
        for members, number in ((blocks, slots), (ends, 1)):
            if members:
                self._pools.append(
                    SlotPool(max(self._slot_bytes(i) for i in members), min(number, len(members)))
                )
                self._pool_of.update(dict.fromkeys(members, self._pools[-1]))
        self._tiers = list(dict.fromkeys(tier_of))  # in an order that all ranks agree on
        self._upcoming: list[int] = []
        self._loads, self._waits = LoadStats(), WaitTimer()

    def _slot_bytes(self, index: int) -> int:
        return self._tier_of[index].slot_bytes(self.units[index])

    @property
    def slot_bytes(self) -> int:
        """Bytes of all slots on the device."""
        return sum(pool.nbytes for pool in self._pools)

    @property
    def matched_group(self):
        """The group whose ranks must visit units in the same order, None if every rank may go on alone."""
        return next((tier.matched_group for tier in self._tier_of if tier.matched_group is not None), None)

    def seal(self) -> None:
        """From here on the units are only read. Collective over the ranks that share a tier."""
        for tier in self._tiers:
            tier.seal()
        for index, unit in enumerate(self.units):
            if index not in self._pool_of:
                self._bind(index, self._tier_of[index].resident(index))
            else:
                for parameter, _ in self._parameters[index]:
                    parameter.data = EMPTY.to(parameter.dtype)

    def rows(self, index: int, name: str) -> torch.Tensor | None:
        """A parameter that lies where single rows can be read without loading it, else None."""
        tier = self._tier_of[index]
        unit = self.units[index]
        piece = next(p for p in unit.pieces if p.name == name)
        memory = tier.resident(index)
        memory = tier.host(index) if memory is None else memory
        return None if memory is None else unit.view(memory, piece)

    def begin(self, sequence: list[int]) -> None:
        """Announce the units that will be used, in order, from here on; loads run ahead of it as far as there
        are slots.
        """
        self._upcoming = [i for i in sequence if i in self._pool_of]
        self._load_ahead()

    @contextmanager
    def use(self, index: int):
        """The unit's parameters hold its values inside. It must be the next one announced."""
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
                moved = pool.handles.pop(index).wait()
            self._count(index, moved)
        self._bind(index, pool.memory[index])
        try:
            yield
        finally:
            for parameter, _ in self._parameters[index]:
                parameter.data = EMPTY.to(parameter.dtype)
            pool.busy.discard(index)
            pool.note_read(pool.memory[index])
            self._load_ahead()

    def address(self, index: int) -> int:
        """Give the address of a unit that is in use, 0 where it never moves.

        A block that a step loads again for its backward pass comes back to where it was: the backward pass
        undoes what the forward pass exchanged (tests/engine/test_base_store.py). So graphs that were built on
        it in between still find its weights.
        """
        pool = self._pool_of.get(index)
        return 0 if pool is None else pool.memory[index].data_ptr()

    def away(self) -> list[torch.Tensor]:
        """Host memory that units wait in."""
        return [tensor for tier in self._tiers for tensor in tier.away()]

    def take_loads(self) -> LoadStats:
        """What was loaded since the last call. Waits for the device, to know how long its arithmetic
        waited.
        """
        taken = self._loads
        self._loads = LoadStats()
        taken.waited_s = self._waits.take()
        return taken

    def close(self) -> None:
        """Wait for what is under way, then give everything back."""
        try:
            for pool in self._pools:
                for handle in pool.handles.values():
                    with suppress(LostPeerError):  # who has closed before owes nothing any more
                        handle.wait()
                pool.handles.clear()
        finally:
            for tier in self._tiers:
                tier.close()
        for parameter in (parameter for unit in self._parameters for parameter, _ in unit):
            parameter.data = EMPTY.to(parameter.dtype)
        self._pools.clear()
        self._pool_of.clear()

    def _bind(self, index: int, data: torch.Tensor) -> None:
        for parameter, piece in self._parameters[index]:
            parameter.data = self.units[index].view(data, piece)

    def _load_ahead(self) -> None:
        for pool in self._pools:
            order = [i for i in self._upcoming if self._pool_of[i] is pool]
            while choice := next_load(order, pool.memory.keys(), pool.busy, pool.slots):
                index, victim = choice
                if (
                    victim in pool.handles
                ):  # loaded ahead for nothing; its slot is free once the load has ended
                    self._count(victim, pool.handles.pop(victim).wait())
                slot = pool.take(index, victim)
                pool.handles[index] = self._tier_of[index].fetch(
                    index, slot[: self._slot_bytes(index)], pool.read_until.get(slot.data_ptr())
                )

    def _count(self, index: int, moved: int) -> None:
        name = self._tier_of[index].name
        self._loads.bytes[name] = self._loads.bytes.get(name, 0) + moved
        self._loads.count += 1


def _aligned(nbytes: int, device) -> torch.Tensor:
    whole = torch.empty(nbytes + UNIT_ALIGN, dtype=torch.uint8, device=device)
    start = -whole.data_ptr() % UNIT_ALIGN
    return whole[start : start + nbytes]
