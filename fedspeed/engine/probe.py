"""Measure the speed of this machine for `fedspeed probe`, whose file `fedspeed plan` reads. It takes under
half a minute on a CPU.

Each rate is the best of a few repetitions, since other work on the machine can only make a measurement
slower.
"""

import mmap
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from fedspeed.cluster.devices import free_memory
from fedspeed.schedule.limits import READ_BYTES, READERS

FORMAT = 1
DISK_BYTES = 256 << 20
COPY_BYTES = 256 << 20
LINK_BYTES = 256 << 20
MEASURE_S = 0.6  # for each rate
LAUNCHED_WIDTH = 64  # of the block whose launches are timed; so narrow that a GPU waits for the host
LAUNCHED_TOKENS = 16
BLOCK = {"cuda": (4096, 2048), "cpu": (1024, 256)}  # width and tokens of the block whose computation is timed
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def probe(folder: Path) -> dict:
    """Return all measurements in the form that the planner reads, in bytes, bytes/s and FLOP/s.

    Args:
        folder: on the disk to measure.
    """
    gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") != "cpu"
    device = torch.device("cuda" if gpu else "cpu")
    ram_rate = _copy_rate(torch.device("cpu"), COPY_BYTES)
    forward_s, backward_s = launch_seconds(device)
    rates = matrix_rates(device)
    free, total = torch.cuda.mem_get_info() if gpu else (0, 0)
    facts = {
        "name": torch.cuda.get_device_name() if gpu else "cpu",
        "kind": device.type if not gpu else "gpu",
        "count": torch.cuda.device_count() if gpu else 0,
        "total_bytes": total,
        "free_bytes": free,
        "flops": rates,
        "block_flops": block_rates(device, rates),
        "memory_bytes_s": _copy_rate(device, COPY_BYTES) * 2 if gpu else 2 * ram_rate,
        "host_bytes_s": ram_rate,
        "launch_forward_s": forward_s,
        "launch_backward_s": backward_s,
    } | (bus_rates(device) if gpu else {})
    disk = os.statvfs(folder)
    return {
        "format": FORMAT,
        "host": socket.gethostname(),
        "device": facts,
        "ram": {
            "total_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "free_bytes": free_memory(),
            "bytes_s": ram_rate,
        },
        "disk": {
            "folder": str(folder),
            "free_bytes": disk.f_bavail * disk.f_frsize,
            "bytes_s": disk_rate(folder),
        },
        "link": {"loopback_bytes_s": loopback_rate()},
    }


def matrix_rates(device: torch.device) -> dict[str, float]:
    """Measure the FLOP/s of a square matrix product for each numeric type that the device supports."""
    rates = {}
    for name, dtype in TYPES.items():
        if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
            continue  # emulated before Ampere
        try:
            rates[name] = _matrix_rate(device, dtype)
        except RuntimeError:
            continue
    if device.type == "cuda":
        rates |= _faster_rates(device)
    return rates


def _faster_rates(device: torch.device) -> dict[str, float]:
    """Measure the FLOP/s under the values of engine.matmul that this GPU and this version of torch
    support.
    """
    rates = {}
    switches = torch.backends.cuda.matmul
    if hasattr(switches, "allow_fp16_accumulation"):
        rates["fp16_accumulation"] = _rate_with(switches, "allow_fp16_accumulation", torch.float16, device)
    if torch.cuda.get_device_capability() >= (8, 0):
        rates["tf32"] = _rate_with(switches, "allow_tf32", torch.float32, device)
    return rates


def _rate_with(switches: object, name: str, dtype: torch.dtype, device: torch.device) -> float:
    """Measure a rate with a switch of torch turned on."""
    before = getattr(switches, name)
    setattr(switches, name, True)
    try:
        return _matrix_rate(device, dtype)
    finally:
        setattr(switches, name, before)


def launch_seconds(device: torch.device) -> tuple[float, float]:
    """Measure the seconds of a forward and of a backward pass of a very small block: the cost of Python and
    of launching kernels.
    """
    block = _Block(LAUNCHED_WIDTH, LAUNCHED_TOKENS, device, torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # kernels are launched by one thread; on a busy CPU it would wait for others
    try:
        forward = _best(block.run_forward, device)
        both = _best(block.run_forward_and_backward, device)
    finally:
        torch.set_num_threads(threads)
    return forward, max(both - forward, forward)  # a backward pass launches at least as many kernels


def block_rates(device: torch.device, names: Iterable[str]) -> dict[str, float]:
    """Measure the FLOP/s of a decoder block's forward and backward pass, by numeric type. It has norms,
    attention and products of unequal sides, and so is slower than a large square product.

    Args:
        names: the types; others than those in TYPES are ignored.
    """
    width, tokens = BLOCK[device.type]
    rates = {}
    for name in names:
        if name not in TYPES:
            continue
        try:
            rates[name] = _block_rate(_Block(width, tokens, device, TYPES[name]), device)
        except RuntimeError:  # too little free memory, or no such operation; the planner then assumes a rate
            continue
    return rates


def _block_rate(block: "_Block", device: torch.device) -> float:
    return block.operations / _best(block.run_forward_and_backward, device)


class _Block(nn.Module):
    """A Llama decoder block with LoRA adapters on its attention, with the operations of the original. Only
    the adapters train.

    Attributes:
        hidden: its input [1, tokens, width].
    """

    _cos: torch.Tensor
    _sin: torch.Tensor

    def __init__(self, width: int, tokens: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self._head = min(64, width // 4)
        wide = 4 * width
        self._norms = nn.ParameterList(nn.Parameter(torch.ones(width), requires_grad=False) for _ in range(2))
        self._frozen = nn.ParameterDict({
            name: nn.Parameter(torch.randn(out, into, device=device) / into, requires_grad=False)
            for name, into, out in (
                *((name, width, width) for name in "qkvo"),
                ("gate", width, wide),
                ("up", width, wide),
                ("down", wide, width),
            )
        })
        self._factors = nn.ParameterDict({
            name: nn.Parameter(torch.randn(shape) / shape[-1])
            for letter in "qkvo"
            for name, shape in ((f"{letter}_a", (8, width)), (f"{letter}_b", (width, 8)))
        })
        angles = torch.arange(tokens)[:, None] * torch.ones(self._head)
        self.register_buffer("_cos", angles.cos())
        self.register_buffer("_sin", angles.sin())
        self.to(device, dtype)
        self.hidden = torch.randn(1, tokens, width, device=device).to(dtype).requires_grad_()
        self._wanted = [self.hidden, *self._factors.values()]

    @property
    def operations(self) -> float:
        """Floating-point operations of a forward and a backward pass, as planner/timing.py counts them."""
        tokens, width = self.hidden.shape[1:]
        frozen = 2 * tokens * sum(weight.numel() for weight in self._frozen.values())
        adapters = 2 * tokens * sum(factor.numel() for factor in self._factors.values())
        return 2 * frozen + 4 * adapters + 3.5 * 4 * width * tokens**2

    def run_forward(self) -> torch.Tensor:
        """Compute a forward pass."""
        return self(self.hidden)

    def run_forward_and_backward(self) -> None:
        """Compute a forward and a backward pass."""
        torch.autograd.grad(self(self.hidden).sum(), self._wanted)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = self._norm(hidden, 0)
        q, k, v = (self._adapted(x, name).unflatten(-1, (-1, self._head)).transpose(1, 2) for name in "qkv")
        mixed = nn.functional.scaled_dot_product_attention(
            self._rotated(q), self._rotated(k), v, is_causal=True
        )
        hidden = hidden + self._adapted(mixed.transpose(1, 2).reshape(hidden.shape), "o")
        x = self._norm(hidden, 1)
        linear = nn.functional.linear
        weights = self._frozen
        return hidden + linear(
            nn.functional.silu(linear(x, weights["gate"])) * linear(x, weights["up"]), weights["down"]
        )

    def _adapted(self, x: torch.Tensor, name: str) -> torch.Tensor:
        linear = nn.functional.linear
        factors = self._factors
        return (
            linear(x, self._frozen[name])
            + linear(linear(x, factors[f"{name}_a"]), factors[f"{name}_b"]) * 2.0
        )

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self._cos + torch.cat((-second, first), dim=-1) * self._sin

    def _norm(self, x: torch.Tensor, number: int) -> torch.Tensor:
        wide = x.float()
        return self._norms[number] * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(
            x.dtype
        )


def _matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a square product. Its size grows until one product takes long enough to be timed,
    so that a CPU that emulates the type is not too slow.
    """
    n = 8192 if device.type == "cuda" else 512
    while True:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        seconds = _best(lambda: a @ b, device)
        if seconds > 0.05 or n >= (8192 if device.type == "cuda" else 2048):
            return 2 * n**3 / seconds
        n *= 2


def _copy_rate(device: torch.device, nbytes: int) -> float:
    """Measure the bytes copied per second within one memory; each is read and written."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    into = torch.empty_like(source)
    return nbytes / _best(lambda: into.copy_(source), device)


def bus_rates(device: torch.device) -> dict[str, float]:
    """Measure the bytes/s between page-locked host memory and a GPU: from the host, to the host, and from the
    host while as many bytes go to it.
    """
    here, there = (torch.ones(COPY_BYTES, dtype=torch.uint8).pin_memory() for _ in range(2))
    up, down = (torch.ones(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    streams = torch.cuda.Stream(), torch.cuda.Stream()

    def both() -> None:
        with torch.cuda.stream(streams[0]):
            up.copy_(here, non_blocking=True)
        with torch.cuda.stream(streams[1]):
            there.copy_(down, non_blocking=True)

    return {
        "host_bytes_s": COPY_BYTES / _best(lambda: up.copy_(here, non_blocking=True), device),
        "down_bytes_s": COPY_BYTES / _best(lambda: there.copy_(down, non_blocking=True), device),
        "both_bytes_s": COPY_BYTES / _best(both, device),
    }


def disk_rate(folder: Path) -> float:
    """Measure the bytes/s of reading a temporary file, bypassing the page cache if the file system supports
    that; otherwise the file is dropped from the cache before.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as file:
        block = os.urandom(READ_BYTES)  # a disk that compresses would be faster with zeros
        for _ in range(DISK_BYTES // READ_BYTES):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            fd = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            fd = os.open(file.name, os.O_RDONLY)
        try:
            with ThreadPoolExecutor(READERS) as threads:
                start = time.perf_counter()
                list(threads.map(lambda at: _read(fd, at), range(0, DISK_BYTES, READ_BYTES)))
                return DISK_BYTES / (time.perf_counter() - start)
        finally:
            os.close(fd)


def _read(fd: int, at: int) -> None:
    with mmap.mmap(-1, READ_BYTES) as buffer:  # aligned to pages, as O_DIRECT requires
        os.preadv(fd, [buffer], at)


def loopback_rate() -> float:
    """Measure the bytes/s of a TCP stream between two threads of this machine, which ranks of one host use on
    a CPU. Between hosts, the hostfile's link_gbps is used.
    """
    chunk = bytes(1 << 20)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def send() -> None:
            with socket.create_connection(server.getsockname(), timeout=10) as out:
                for _ in range(LINK_BYTES // len(chunk)):
                    out.sendall(chunk)

        sender = threading.Thread(target=send)
        sender.start()
        server.settimeout(10)
        into = server.accept()[0]
        buffer = bytearray(1 << 20)
        received = 0
        with into:
            start = time.perf_counter()
            while count := into.recv_into(buffer):
                received += count
            seconds = time.perf_counter() - start
        sender.join()
    return received / seconds


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest run within MEASURE_S seconds, after a first run that is not
    counted.
    """

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    end = time.perf_counter() + MEASURE_S
    best = float("inf")
    while time.perf_counter() < end:
        best = min(best, once())
    return best
