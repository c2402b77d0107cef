"""The fake accelerator in the place of DeepSpeed's, for all threads."""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
from deepspeed.accelerator import real_accelerator

from tests.fake_cuda.accelerator import FakeCuda
from tests.fake_cuda.streams import FakeEvent


@contextmanager
def fake_cuda(seed: int = 0, **options):
    """The fake in the place of DeepSpeed's accelerator, for all threads; `options` are FakeCuda's."""
    fake = FakeCuda(seed, **options)
    to = torch.Tensor.to
    cpu = torch.Tensor.cpu
    numpy = torch.Tensor.numpy
    submit = ThreadPoolExecutor.submit
    result = Future.result
    gather = torch.distributed.all_gather_into_tensor

    def moved(tensor, *args, **kwargs):
        named = any(isinstance(word, str | torch.device) for word in (*args, kwargs.get("device")))
        if named and fake.is_pinned(tensor):
            tensor = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(
                tensor, non_blocking=kwargs.get("non_blocking", False)
            )
        return to(tensor, *args, **kwargs)

    def to_host(tensor, *args, **kwargs):
        fake.current_stream().synchronize()
        return cpu(tensor, *args, **kwargs)

    def as_numpy(tensor, *args, **kwargs):
        if not fake.quiet and fake.is_pinned(tensor):
            fake.host_access(tensor)
        return numpy(tensor, *args, **kwargs)

    def submitted(pool, function, /, *args, **kwargs):
        handed = dict(fake.host().clock)
        ends = []
        fake.host().tick()

        def run():
            fake.host().learn(handed)
            try:
                with fake.watching():
                    return function(*args, **kwargs)
            finally:
                ends.append(dict(fake.host().clock))
                fake.host().tick()

        future = submit(pool, run)
        future.fake_ends = ends
        return future

    def awaited(future, timeout=None):
        try:
            return result(future, timeout)
        finally:
            for clock in getattr(future, "fake_ends", ()):
                fake.host().learn(clock)

    def gathered(output, own, group=None, async_op=False):
        if not async_op:
            return gather(output, own, group=group)
        fake._gathers.wait_stream(fake.current_stream())
        with fake.stream(fake._gathers):
            work = gather(output, own, group=group, async_op=True)
        return _Work(fake, work, fake._gathers.record_event(), own)

    cudart = SimpleNamespace(cudaHostRegister=fake.register, cudaHostUnregister=fake.unregister)
    with ExitStack() as stack:
        for owner, name, value in (
            (real_accelerator, "ds_accelerator", fake),
            (torch.Tensor, "to", moved),
            (torch.Tensor, "cpu", to_host),
            (torch.Tensor, "numpy", as_numpy),
            (torch.Tensor, "pin_memory", lambda tensor, device=None: fake.pinned_copy(tensor)),
            (torch.Tensor, "is_pinned", lambda tensor, device=None: fake.is_pinned(tensor)),
            (torch.Tensor, "record_stream", lambda tensor, stream: fake.record_stream(tensor, stream)),
            (torch.cuda, "cudart", lambda: cudart),
            (ThreadPoolExecutor, "submit", submitted),
            (Future, "result", awaited),
            (torch.distributed, "all_gather_into_tensor", gathered),
        ):
            stack.enter_context(patch.object(owner, name, value))
        with fake.watching():
            try:
                yield fake
            finally:
                fake.synchronize()
                fake.open = False


class _Work:
    """A collective that is under way, as NCCL's: waiting for it holds up the stream. It keeps what it reads
    until then.
    """

    def __init__(self, fake: FakeCuda, work, event: FakeEvent, own: torch.Tensor):
        self._fake = fake
        self._work = work
        self._event = event
        self._own = own

    def wait(self, *deadline) -> bool:
        done = self._work.wait(*deadline)
        self._event.wait()
        self._own = None
        return done
