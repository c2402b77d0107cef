"""Timeline of one layer-major optimizer step on one device. Pure.

A compute stream visits the blocks forwards and then backwards. Beside it one engine copies from host to
device and another from device to host; each carries out its transfers one after the other, in the order in
which they become possible, and never interrupts one. Which block is loaded when, and into whose slot, is
decided by the rule that the engine itself follows (`schedule.loads`).
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

from fedspeed.schedule.kept import equal_kept_counts
from fedspeed.schedule.loads import next_load, step_order

DEVICE = "device"  # block inputs stay on the device
HOST = "host"  # they travel on streams of their own, one block ahead
# What the engine did before, for comparison: they travel on the compute stream, either between the loads or
# behind those that are under way.
INLINE = "inline"
BEHIND_LOADS = "behind loads"


@dataclass(frozen=True)
class Visits:
    """Seconds that one micro-batch spends in one block: forward, again in the backward pass, its gradients;
    in the head; and one of its block inputs on the way to the host or back.
    """

    forward: float
    again: float
    gradients: float
    head: float
    carry: float = 0.0


@dataclass(frozen=True)
class Base:
    """Describe where the blocks of a base are, and how long one takes to come.

    Attributes:
        slots: places on the device for blocks that are loaded. resident: blocks that never leave it.
        load: seconds of one block's load.
        ahead: seconds of loading the head and, after the turn, the embedding, where these take turns in a
            slot of their own; 0: they stay.
        shares_engine: whether loads and block inputs come through the same copy engine.
        slowed: seconds that one block's inputs on their way down add to a load beside them.
    """

    blocks: int
    slots: int
    load: float
    resident: frozenset[int] = frozenset()
    ahead: float = 0.0
    shares_engine: bool = True
    slowed: float = 0.0


@dataclass(frozen=True)
class Step:
    """Seconds of a step; of them the compute stream waited for loads, and for block inputs or their
    transfers.
    """

    seconds: float
    waited_for_loads: float
    waited_for_inputs: float


@dataclass(frozen=True)
class Load:
    """One load of a step: the visit whose end frees its slot, and the visit that needs it."""

    after: int
    before: int


@lru_cache(maxsize=8192)
def loads_of(blocks: int, slots: int, resident: frozenset[int] = frozenset()) -> tuple[Load, ...]:
    """List the loads of one step of many, in their order, as the engine's store decides on them: when a block
    comes into use and when it goes out of it.

    A step begins with the first blocks in the slots, which is what the step before it ended with.
    """
    visits = [(visit, block) for visit, block in enumerate(step_order(blocks)) if block not in resident]
    upcoming = [block for _, block in visits] + [block for block in range(blocks) if block not in resident]
    slots = min(slots, blocks - len(resident))
    held = set(upcoming[:slots])
    last_use: dict[int, int] = {}
    found: list[Load] = []

    def load_ahead(position: int, busy: Collection[int]) -> None:
        while choice := next_load(upcoming[position:], held, busy, slots):
            block, victim = choice
            held.remove(victim)
            held.add(block)
            found.append(
                Load(last_use[victim], next(visit for visit, used in visits[position:] if used == block))
            )

    for position, (visit, block) in enumerate(visits):
        load_ahead(position, ())
        load_ahead(position + 1, (block,))
        last_use[block] = visit
        load_ahead(position + 1, ())
    return tuple(found)


def walk(
    visits: Visits, base: Base, micro_batches: int, *, inputs: str = DEVICE, kept: int = 0, fixed: float = 0.0
) -> Step:
    """Go through one step of many.

    Args:
        inputs: where block inputs wait for the backward pass: DEVICE, HOST, INLINE or BEHIND_LOADS.
        kept: blocks and micro-batches, counted in pairs, whose activations are kept: they are not computed
            again, and their inputs are not carried.
        fixed: seconds at the end of a step in which the device computes nothing of it.
    """
    if (
        inputs == DEVICE and not base.ahead and len(base.resident) + base.slots >= base.blocks
    ):  # nothing moves
        again = max(0, micro_batches * (base.blocks - 1) - kept)
        computed = (
            micro_batches * (base.blocks * (visits.forward + visits.gradients) + visits.head)
            + again * visits.again
        )
        return Step(computed + fixed, 0.0, 0.0)
    return _Timeline(visits, base, micro_batches, inputs, kept).run(fixed)


class _Timeline:
    """The streams of one step. Times are seconds since its begin."""

    def __init__(self, visits: Visits, base: Base, micro_batches: int, inputs: str, kept: int):
        self.visits = visits
        self.base = base
        self.micro_batches = micro_batches
        self.inputs = inputs
        self.kept = equal_kept_counts(kept, micro_batches, base.blocks) if kept else [0] * base.blocks
        self.loads = (
            loads_of(base.blocks, base.slots, base.resident) if len(base.resident) < base.blocks else ()
        )
        self.needed = {load.before: number for number, load in enumerate(self.loads)}
        self.arrived = [0.0] * len(self.loads)
        self.begun = 0  # loads that have been given to the engine
        self.clock = 0.0  # of the compute stream
        # When the engines are free: of loads, of inputs where these have another one, of inputs going down.
        self.up = 0.0
        self.own_up = 0.0
        self.down = 0.0
        self.ends: list[float] = []  # of the visits
        self.sent: dict[int, float] = {}  # block -> when its inputs are on the host
        self.coming: dict[int, float] = {}  # block -> when the engine begins to bring its inputs
        self.for_loads = 0.0  # seconds that the compute stream waited
        self.for_inputs = 0.0

    def run(self, fixed: float) -> Step:
        turn = self.base.blocks - 1
        self.up += self.base.ahead  # the head, in the slot that the embedding has left
        head = self.up
        embedding = 0.0
        for visit, block in enumerate(step_order(self.base.blocks)):
            asked = self.ends[-1] if self.ends else 0.0
            if self.inputs == HOST and visit >= turn and block > 0:
                self._bring(block - 1, asked)
            if visit in self.needed:
                self._settle_through(self.needed[visit])
                self._wait_for_load(self.arrived[self.needed[visit]])
            if visit == turn:
                self._wait_for_load(head)
                self.clock += self.micro_batches * (
                    self.visits.forward + self.visits.gradients + self.visits.head
                )
                self._settle_ready(self.clock)
                self.up = max(self.up, self.clock) if self.base.ahead else self.up
                self.up += self.base.ahead
                embedding = self.up
            elif visit < turn:
                self._forward(block)
            else:
                self._backward(block)
            self.ends.append(self.clock)
        self.clock += fixed
        self._wait_for_load(embedding)
        return Step(self.clock, self.for_loads, self.for_inputs)

    def _forward(self, block: int) -> None:
        self.clock += self.micro_batches * self.visits.forward
        carried = (self.micro_batches - self.kept[block]) * self.visits.carry
        if self.inputs in (INLINE, BEHIND_LOADS):
            self._carry(carried)
        elif self.inputs == HOST:
            # At most two blocks' inputs are on their way: a block begins when those of the last but one have
            # gone.
            begun = max(self.ends[-1] if self.ends else 0.0, self.down)
            self.down = begun + carried
            self.sent[block] = self.down
            if (behind := self.sent.get(block - 1, 0.0)) > self.clock:
                self._carry(behind - self.clock)

    def _backward(self, block: int) -> None:
        visits = self.visits
        kept = self.kept[block]
        computed = self.micro_batches - kept
        again = visits.again + visits.gradients
        self.clock += kept * visits.gradients
        if self.inputs == BEHIND_LOADS:
            for _ in range(computed):
                self._settle_ready(self.clock)
                start = max(self.clock, self.up)
                self._carry(start + visits.carry - self.clock)
                self.up = max(self.up, self.clock)
                self.clock += again
            return
        if self.inputs == INLINE:
            self._carry(computed * visits.carry)
        end = self.clock + computed * again
        if self.inputs == HOST and computed:
            # Computing goes on from the first micro-batch that it had to wait for: either the first or the
            # last.
            begun = self.coming[block]
            latest = max(begun + visits.carry + computed * again, begun + computed * visits.carry + again)
            if latest > end:
                self.for_inputs += latest - end
                end = latest
        self.clock = end

    def _carry(self, seconds: float) -> None:
        """Let the compute stream do nothing but wait for block inputs."""
        self.clock += seconds
        self.for_inputs += seconds

    def _bring(self, block: int, asked: float) -> None:
        """Ask for a block's inputs, behind the loads that became possible before."""
        carried = (self.micro_batches - self.kept[block]) * self.visits.carry
        asked = max(asked, self.sent.get(block, 0.0))
        if not self.base.shares_engine:
            self.coming[block] = max(self.own_up, asked)
            self.own_up = self.coming[block] + carried
            return
        self._settle_ready(asked)
        self.coming[block] = max(self.up, asked)
        if carried:
            self.up = self.coming[block] + carried

    def _wait_for_load(self, arrived: float) -> None:
        if arrived > self.clock:
            self.for_loads += arrived - self.clock
            self.clock = arrived

    def _settle_ready(self, now: float) -> None:
        """Give the engine every load that is possible by now."""
        while self.begun < len(self.loads):
            after = self.loads[self.begun].after
            if after >= len(self.ends) or self.ends[after] > now:
                return
            self._begin_next()

    def _settle_through(self, number: int) -> None:
        while self.begun <= number:
            self._begin_next()

    def _begin_next(self) -> None:
        load = self.loads[self.begun]
        beside_inputs = self.inputs == HOST and load.after < self.base.blocks - 1
        self.up = (
            max(self.up, self.ends[load.after])
            + self.base.load
            + (self.base.slowed if beside_inputs else 0.0)
        )
        self.arrived[self.begun] = self.up
        self.begun += 1
