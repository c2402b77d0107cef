"""Inputs of blocks between the forward and the backward pass: on the device, or in host memory and on their
way to and from it.

They travel in streams of their own. In the stream of the arithmetic each would stand behind the weights that
are on their way, which are many times larger.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from deepspeed.accelerator import get_accelerator

from fedspeed.engine.compute.uploads import pinned_tensor
from fedspeed.schedule.limits import CARRIED


@dataclass
class StoredInput:
    """One input. `home`: where it waits; `here`: on the device, None while it is away; `ready`: the event
    after which it is there.
    """

    home: torch.Tensor | None
    here: torch.Tensor | None
    ready: object = None

    def take(self) -> torch.Tensor:
        """The input on the device; whatever computes with it waits until it is there."""
        if self.ready is not None:
            get_accelerator().current_stream().wait_event(self.ready)
        found = self.here
        self.home = None
        self.here = None
        return found


@dataclass
class _Departure:
    """Inputs of one block on their way down: kept here until the arithmetic waits for the event behind the
    last of them.
    """

    inputs: list[torch.Tensor] = field(default_factory=list)
    sent: object = None


class BlockInputs:
    """Puts inputs away and brings them back. On a device that shares the host's memory they stay where they
    are.
    """

    def __init__(self):
        self._apart = not get_accelerator().is_synchronized_device()
        self._down, self._up = (
            (get_accelerator().Stream(), get_accelerator().Stream()) if self._apart else (None, None)
        )
        self._going: deque[_Departure] = deque()

    def begin_block(self) -> None:
        """The next block's inputs follow. At most two blocks' are on their way, so that a bounded number
        takes memory of the device.
        """
        while len(self._going) >= CARRIED:
            self._gone(self._going.popleft())
        self._going.append(_Departure())

    def put(self, hidden: torch.Tensor, on_host: bool) -> StoredInput:
        """Take a block's input; with `on_host` its copy to host memory begins."""
        if not (on_host and self._apart):
            return StoredInput(None, hidden)
        accelerator = get_accelerator()
        home = pinned_tensor(hidden.shape, hidden.dtype, "the inputs of blocks")
        self._down.wait_event(_now())
        with accelerator.stream(self._down):
            home.copy_(hidden, non_blocking=True)
            self._going[-1].sent = accelerator.Event()
            self._going[-1].sent.record(self._down)
        self._going[-1].inputs.append(hidden)
        return StoredInput(home, None)

    def turn(self) -> None:
        """No more inputs are put away in this pass."""
        while self._going:
            self._gone(self._going.popleft())

    def forget(self) -> None:
        """Let go of what is on its way, after a pass that has failed; the device must have been waited
        for.
        """
        self._going.clear()

    def _gone(self, going: "_Departure") -> None:
        """Let the arithmetic wait until a block's inputs have gone down; only then may it write where they
        were.
        """
        if going.sent is not None:
            get_accelerator().current_stream().wait_event(going.sent)

    def bring(self, inputs: Sequence[StoredInput]) -> None:
        """Begin to bring a block's inputs back: call it one block early."""
        away = [waiting for waiting in inputs if waiting.here is None]
        if not away:
            return
        accelerator = get_accelerator()
        device = accelerator.current_device_name()
        for waiting in away:
            waiting.here = torch.empty(waiting.home.shape, dtype=waiting.home.dtype, device=device)
        # Their places may have belonged to what the arithmetic so far still reads. It has waited, too, until
        # they had gone down (`turn`).
        self._up.wait_event(_now())
        with accelerator.stream(self._up):
            for waiting in away:
                waiting.here.copy_(waiting.home, non_blocking=True)
                waiting.ready = accelerator.Event()
                waiting.ready.record(self._up)


def _now():
    """An event behind what the arithmetic has been asked for so far."""
    event = get_accelerator().Event()
    event.record(get_accelerator().current_stream())
    return event
