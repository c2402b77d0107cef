"""What this machine can do, measured: for `fedspeed probe`, whose file `fedspeed plan` reads. Takes under
half a minute on a CPU.

Each rate is that of the best of a few repetitions, since other work on the machine can only make one slower.
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
MEASURE_S = 0.6  # of each rate
LAUNCHED_WIDTH = 64  # of the block whose launches are timed: so narrow that a GPU waits for its host
LAUNCHED_TOKENS = 16
BLOCK = {"cuda": (4096, 2048), "cpu": (1024, 256)}  # width and tokens of the block whose arithmetic is timed
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def probe(folder: Path) -> dict:
    """All facts, in the form that planner.hardware.read_probe checks. Bytes, bytes/s and FLOP/s.

    Args:
        folder: on the disk that is to be measured.
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
    """FLOP/s of a square matrix product, by numeric type; types it cannot compute in are left out."""
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
    """FLOP/s under the values of engine.matmul that this card and this version of torch know."""
    rates = {}
    switches = torch.backends.cuda.matmul
    if hasattr(switches, "allow_fp16_accumulation"):
        rates["fp16_accumulation"] = _rate_with(switches, "allow_fp16_accumulation", torch.float16, device)
    if torch.cuda.get_device_capability() >= (8, 0):
        rates["tf32"] = _rate_with(switches, "allow_tf32", torch.float32, device)
    return rates


def _rate_with(switches, name: str, dtype: torch.dtype, device: torch.device) -> float:
    before = getattr(switches, name)
    setattr(switches, name, True)
    try:
        return _matrix_rate(device, dtype)
    finally:
        setattr(switches, name, before)


def launch_seconds(device: torch.device) -> tuple[float, float]:
    """Seconds that one micro-batch's forward and its backward take in a block with hardly any arithmetic:
    what Python and starting the kernels cost.
    """
    block = _Block(LAUNCHED_WIDTH, LAUNCHED_TOKENS, device, torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one thread starts kernels, and on a busy CPU others would be waited for
    try:
        forward = _best(block.forwards, device)
        both = _best(block.both_ways, device)
    finally:
        torch.set_num_threads(threads)
    return forward, max(both - forward, forward)  # a backward starts no fewer kernels


def block_rates(device: torch.device, names: Iterable[str]) -> dict[str, float]:
    """FLOP/s that a decoder block gets out of the device, forwards and backwards, by numeric type. It has
    norms, attention and products of unequal sides, and so reaches less than a large square product.
    """
    width, tokens = BLOCK[device.type]
    rates = {}
    for name in names:
        if name not in TYPES:
            continue
        try:
            block = _Block(width, tokens, device, TYPES[name])
            rates[name] = block.operations / _best(block.both_ways, device)
        except (
            RuntimeError
        ):  # no room on a card that others use, or no such operation; the planner has an assumption
            continue
        finally:
            block = None  # before the next one is made
    return rates


class _Block(nn.Module):
    """A decoder block with adapters on its attention, as Llama's: its operations, in the way they are written
    there. Frozen but for the adapters; `hidden` is its input.
    """

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
        """Of a forward and a backward, as planner/timing.py counts them."""
        tokens, width = self.hidden.shape[1:]
        frozen = 2 * tokens * sum(weight.numel() for weight in self._frozen.values())
        adapters = 2 * tokens * sum(factor.numel() for factor in self._factors.values())
        return 2 * frozen + 4 * adapters + 3.5 * 4 * width * tokens**2

    def forwards(self) -> torch.Tensor:
        return self(self.hidden)

    def both_ways(self) -> None:
        torch.autograd.grad(self(self.hidden).sum(), self._wanted)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = self._norm(hidden, 0)
        q, k, v = (self._adapted(x, name).unflatten(-1, (-1, self._head)).transpose(1, 2) for name in "qkv")
        mixed = nn.functional.scaled_dot_product_attention(
            self._turned(q), self._turned(k), v, is_causal=True
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

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self._cos + torch.cat((-second, first), dim=-1) * self._sin

    def _norm(self, x: torch.Tensor, number: int) -> torch.Tensor:
        wide = x.float()
        return self._norms[number] * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(
            x.dtype
        )


def _matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The size is such that one product takes a while on a GPU, and not for ever on a CPU that emulates the
    type.
    """
    n = 8192 if device.type == "cuda" else 512
    while True:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        seconds = _best(lambda: a @ b, device)
        if seconds > 0.05 or n >= (8192 if device.type == "cuda" else 2048):
            return 2 * n**3 / seconds
        n *= 2


def _copy_rate(device: torch.device, nbytes: int) -> float:
    """Bytes copied per second within one memory (each is read and written)."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    into = torch.empty_like(source)
    return nbytes / _best(lambda: into.copy_(source), device)


def bus_rates(device: torch.device) -> dict[str, float]:
    """Bytes/s between page-locked host memory and a GPU: from the host, to it, and from it while as many go
    to it.
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
    """Reading a temporary file past the page cache where the file system can, after dropping it from the
    cache where not.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as file:
        block = os.urandom(READ_BYTES)  # a disk that compresses would show off with zeros
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
    with mmap.mmap(-1, READ_BYTES) as buffer:  # pages of its own, aligned as O_DIRECT asks
        os.preadv(fd, [buffer], at)


def loopback_rate() -> float:
    """One TCP stream between two threads of this machine: what ranks of one host have on a CPU. Between
    hosts, the hostfile's link_gbps counts.
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
    """Seconds of the fastest run within MEASURE_S, after one to warm up."""

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
