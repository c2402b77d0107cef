"""The timeline of one layer-major optimizer step on one device. Pure.

A compute stream goes through the blocks forwards and then backwards. At the same time one copy engine copies
from host to device and another one from device to host. Each engine executes its transfers in the order in
which they become possible and never interrupts one. The function that decides which block is loaded next, and
into which slot, is the one that the execution itself calls (`schedule.loads`).
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

from fedspeed.schedule.kept_activations import equal_kept_counts
from fedspeed.schedule.loads import next_load, step_order

# Where block inputs wait for the backward pass.
DEVICE = "device"  # they stay on the device
HOST = "host"  # they are copied to the host and prefetched one block ahead, on streams of their own
# Two earlier ways to copy them to the host, for comparison: on the compute stream, which waits for them.
INLINE = "inline"  # between the loads
BEHIND_LOADS = "behind loads"  # behind the loads that have been started


@dataclass(frozen=True)
class BlockTimes:
    """Seconds that one micro-batch takes in one block.

    Attributes:
        forward: the forward pass.
        recompute: the forward pass repeated during the backward pass.
        gradients: the backward pass without it.
        head: head and loss, once a micro-batch.
        input_transfer: copying the block's input to the host, or back.
    """

    forward: float
    recompute: float
    gradients: float
    head: float
    input_transfer: float = 0.0


@dataclass(frozen=True)
class StreamedBase:
    """Describe where the blocks of a base are stored and how long it takes to load one.

    Attributes:
        slots: buffers on the device for loaded blocks.
        load: seconds to load one block.
        resident: blocks that always stay on the device.
        head_load: seconds to load the head, and later the embedding, where the two share a slot; 0 if they
            stay on the device.
        shares_copy_engine: whether loads and block inputs use the same copy engine.
        slowdown: seconds that the inputs of one block, on their way to the host, add to a simultaneous load.
    """

    blocks: int
    slots: int
    load: float
    resident: frozenset[int] = frozenset()
    head_load: float = 0.0
    shares_copy_engine: bool = True
    slowdown: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, and how many of them the compute stream waited for loads and for block inputs."""

    seconds: float
    waited_for_loads: float
    waited_for_inputs: float


@dataclass(frozen=True)
class Load:
    """One load of a step, which needs a free slot. Passes through a block are counted from 0 in a step.

    Attributes:
        after: the pass through a block after which its slot is free.
        before: the pass that needs the loaded block.
    """

    after: int
    before: int


@lru_cache(maxsize=8192)
def loads_of(blocks: int, slots: int, resident: frozenset[int] = frozenset()) -> tuple[Load, ...]:
    """List the loads of one step among many, in their order, as the engine's store decides on them: when a
    pass through a block begins and when it ends.

    A step begins with the first blocks in the slots, because the step before it ended with these.
    """
    passes = [(number, block) for number, block in enumerate(step_order(blocks)) if block not in resident]
    upcoming = [block for _, block in passes] + [block for block in range(blocks) if block not in resident]
    slots = min(slots, blocks - len(resident))
    loaded = set(upcoming[:slots])
    last_pass: dict[int, int] = {}
    loads: list[Load] = []

    def start_loads(position: int, busy: Collection[int]) -> None:
        while choice := next_load(upcoming[position:], loaded, busy, slots):
            block, evicted = choice
            assert evicted is not None, "all slots are occupied from the first pass on"
            loaded.remove(evicted)
            loaded.add(block)
            needed = next(number for number, used in passes[position:] if used == block)
            loads.append(Load(last_pass[evicted], needed))

    for position, (number, block) in enumerate(passes):
        start_loads(position, ())
        start_loads(position + 1, (block,))
        last_pass[block] = number
        start_loads(position + 1, ())
    return tuple(loads)


def step_time(
    times: BlockTimes,
    base: StreamedBase,
    micro_batches: int,
    *,
    inputs: str = DEVICE,
    kept: int = 0,
    fixed: float = 0.0,
) -> StepTime:
    """Simulate one step among many.

    Args:
        inputs: where block inputs wait for the backward pass: DEVICE, HOST, INLINE or BEHIND_LOADS.
        kept: pairs of a block and a micro-batch whose activations are kept. They are not recomputed, and
            their inputs are not copied.
        fixed: seconds at the end of a step in which the device computes nothing of it.
    """
    nothing_is_copied = (
        inputs == DEVICE and not base.head_load and len(base.resident) + base.slots >= base.blocks
    )
    if nothing_is_copied:
        recomputed = max(0, micro_batches * (base.blocks - 1) - kept)
        computed = (
            micro_batches * (base.blocks * (times.forward + times.gradients) + times.head)
            + recomputed * times.recompute
        )
        return StepTime(computed + fixed, 0.0, 0.0)
    return _Timeline(times, base, micro_batches, inputs, kept).run(fixed)


class _Timeline:
    """The state of a step's streams. Times are seconds since the step began."""

    def __init__(self, times: BlockTimes, base: StreamedBase, micro_batches: int, inputs: str, kept: int):
        self.times = times
        self.base = base
        self.micro_batches = micro_batches
        self.inputs = inputs
        self.kept = equal_kept_counts(kept, micro_batches, base.blocks) if kept else [0] * base.blocks
        self.loads: tuple[Load, ...] = ()
        if len(base.resident) < base.blocks:
            self.loads = loads_of(base.blocks, base.slots, base.resident)
        self.load_for_pass = {load.before: number for number, load in enumerate(self.loads)}
        self.load_end = [0.0] * len(self.loads)
        self.loads_started = 0
        self.clock = 0.0  # of the compute stream
        # When each copy engine is free again.
        self.uploads_free = 0.0
        self.input_uploads_free = 0.0  # only where block inputs do not share the engine with loads
        self.downloads_free = 0.0
        self.pass_end: list[float] = []
        self.input_downloaded: dict[int, float] = {}  # block -> when its inputs are on the host
        self.input_upload_start: dict[int, float] = {}  # block -> when its inputs start to come back
        self.waited_for_loads = 0.0
        self.waited_for_inputs = 0.0

    def run(self, fixed: float) -> StepTime:
        """Go through all passes of a step and return its time."""
        last_block = self.base.blocks - 1  # also the number of the pass that goes forwards and backwards
        self.uploads_free += self.base.head_load  # into the slot that the embedding has left
        head_loaded = self.uploads_free
        embedding_loaded = 0.0
        for number, block in enumerate(step_order(self.base.blocks)):
            pass_start = self.pass_end[-1] if self.pass_end else 0.0
            if self.inputs == HOST and number >= last_block and block > 0:
                self._prefetch_inputs(block - 1, pass_start)
            if number in self.load_for_pass:
                self._start_loads_through(self.load_for_pass[number])
                self._wait_for_load(self.load_end[self.load_for_pass[number]])
            if number == last_block:
                self._wait_for_load(head_loaded)
                self.clock += self.micro_batches * (
                    self.times.forward + self.times.gradients + self.times.head
                )
                self._start_possible_loads(self.clock)
                if self.base.head_load:
                    self.uploads_free = max(self.uploads_free, self.clock)
                self.uploads_free += self.base.head_load
                embedding_loaded = self.uploads_free
            elif number < last_block:
                self._forward(block)
            else:
                self._backward(block)
            self.pass_end.append(self.clock)
        self.clock += fixed
        self._wait_for_load(embedding_loaded)
        return StepTime(self.clock, self.waited_for_loads, self.waited_for_inputs)

    def _forward(self, block: int) -> None:
        self.clock += self.micro_batches * self.times.forward
        transfer = (self.micro_batches - self.kept[block]) * self.times.input_transfer
        if self.inputs in (INLINE, BEHIND_LOADS):
            self._wait_for_inputs(transfer)
        elif self.inputs == HOST:
            # The inputs of at most two blocks are on their way: a block begins when those of the last but
            # one have arrived.
            start = max(self.pass_end[-1] if self.pass_end else 0.0, self.downloads_free)
            self.downloads_free = start + transfer
            self.input_downloaded[block] = self.downloads_free
            previous = self.input_downloaded.get(block - 1, 0.0)
            if previous > self.clock:
                self._wait_for_inputs(previous - self.clock)

    def _backward(self, block: int) -> None:
        times = self.times
        kept = self.kept[block]
        recomputed = self.micro_batches - kept
        backward = times.recompute + times.gradients
        self.clock += kept * times.gradients
        if self.inputs == BEHIND_LOADS:
            for _ in range(recomputed):
                self._start_possible_loads(self.clock)
                start = max(self.clock, self.uploads_free)
                self._wait_for_inputs(start + times.input_transfer - self.clock)
                self.uploads_free = max(self.uploads_free, self.clock)
                self.clock += backward
            return
        if self.inputs == INLINE:
            self._wait_for_inputs(recomputed * times.input_transfer)
        end = self.clock + recomputed * backward
        if self.inputs == HOST and recomputed:
            # The computation is bound either by the arrival of the first input or by that of the last one.
            start = self.input_upload_start[block]
            latest = max(
                start + times.input_transfer + recomputed * backward,
                start + recomputed * times.input_transfer + backward,
            )
            if latest > end:
                self.waited_for_inputs += latest - end
                end = latest
        self.clock = end

    def _wait_for_inputs(self, seconds: float) -> None:
        """Let the compute stream do nothing but wait for block inputs."""
        self.clock += seconds
        self.waited_for_inputs += seconds

    def _prefetch_inputs(self, block: int, requested: float) -> None:
        """Request a block's inputs, behind the loads that became possible earlier."""
        transfer = (self.micro_batches - self.kept[block]) * self.times.input_transfer
        requested = max(requested, self.input_downloaded.get(block, 0.0))
        if not self.base.shares_copy_engine:
            self.input_upload_start[block] = max(self.input_uploads_free, requested)
            self.input_uploads_free = self.input_upload_start[block] + transfer
            return
        self._start_possible_loads(requested)
        self.input_upload_start[block] = max(self.uploads_free, requested)
        if transfer:
            self.uploads_free = self.input_upload_start[block] + transfer

    def _wait_for_load(self, end: float) -> None:
        if end > self.clock:
            self.waited_for_loads += end - self.clock
            self.clock = end

    def _start_possible_loads(self, now: float) -> None:
        """Start every load whose slot is free by now."""
        while self.loads_started < len(self.loads):
            after = self.loads[self.loads_started].after
            if after >= len(self.pass_end) or self.pass_end[after] > now:
                return
            self._start_next_load()

    def _start_loads_through(self, number: int) -> None:
        while self.loads_started <= number:
            self._start_next_load()

    def _start_next_load(self) -> None:
        load = self.loads[self.loads_started]
        inputs_go_down = self.inputs == HOST and load.after < self.base.blocks - 1
        self.uploads_free = (
            max(self.uploads_free, self.pass_end[load.after])
            + self.base.load
            + (self.base.slowdown if inputs_go_down else 0.0)
        )
        self.load_end[self.loads_started] = self.uploads_free
        self.loads_started += 1
