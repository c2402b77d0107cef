"""Streams and events of an accelerator, as far as the engine uses them. A CPU has none."""

from typing import Protocol

from deepspeed.accelerator import get_accelerator


class DeviceEvent(Protocol):
    """Describe an event of an accelerator, such as `torch.cuda.Event`."""

    def record(self, stream: "DeviceStream") -> None: ...

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: "DeviceEvent") -> float: ...


class DeviceStream(Protocol):
    """Describe a stream of an accelerator, such as `torch.cuda.Stream`."""

    def wait_event(self, event: DeviceEvent) -> None: ...


def event_after_queued_work() -> DeviceEvent:
    """Return an event that occurs once all work queued so far in the current stream is done."""
    event = get_accelerator().Event()
    event.record(get_accelerator().current_stream())
    return event
