"""A fake accelerator: streams, events and host threads are ordered as on a GPU, all tensors are on the CPU.

    with fake_cuda(seed) as fake:
        ...  # get_accelerator() is the fake: streams, events, pinned memory
    assert fake.races == []

It finds errors of order in two ways. Vector clocks: two accesses to the same bytes, at least one of them a
write, from streams or host threads that nothing has synchronised are a race, whatever order the run
happened to take; so is memory that is freed while another stream may still use it. Deferred copies: a copy
in a stream other than the default one is executed later, at random moments, but not before what its stream
waited for, and at the latest when somebody waits for it; so a missing wait gives wrong numbers. (A copy
that comes too early is found by the clocks only, because the default stream executes everything at once.)

All memory is on the CPU, so only its history says whether it counts as memory of the device or of the host:
- made by an operation: of the device, and of the stream in which the operation ran;
- pinned (`pin_memory`, or registered with the driver): of the host, and copied asynchronously with
  `non_blocking`;
- made outside torch's operations (numpy, mapped files): pageable memory of the host, with which every copy
  waits.
"""

from tests.fake_cuda.patches import fake_cuda as fake_cuda
from tests.fake_cuda.streams import FakeEvent as FakeEvent
