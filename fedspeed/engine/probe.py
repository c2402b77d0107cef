"""What this machine can do, measured: for `fedspeed probe`, whose file `fedspeed plan` reads. Takes under half a minute on a CPU.

Each rate is that of the best of a few repetitions, since other work on the machine can only make one slower.
"""

import mmap
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fedspeed.cluster.devices import free_memory
from fedspeed.engine.config import READ_BYTES, READERS

FORMAT = 1
DISK_BYTES = 256 << 20
COPY_BYTES = 256 << 20
LINK_BYTES = 256 << 20
MEASURE_S = 0.6  # of each rate


def probe(folder: Path) -> dict:
    """All facts, in the form that planner.hardware.read_probe checks. Bytes, bytes/s and FLOP/s.

    Args:
        folder: on the disk that is to be measured.
    """
    gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") != "cpu"
    device = torch.device("cuda" if gpu else "cpu")
    ram_rate = _copy_rate(torch.device("cpu"), COPY_BYTES)
    free, total = torch.cuda.mem_get_info() if gpu else (0, 0)
    facts = {"name": torch.cuda.get_device_name() if gpu else "cpu", "kind": device.type if not gpu else "gpu",
             "count": torch.cuda.device_count() if gpu else 0, "total_bytes": total, "free_bytes": free, "flops": matrix_rates(device),
             "memory_bytes_s": _copy_rate(device, COPY_BYTES) * 2 if gpu else 2 * ram_rate, "host_bytes_s": _upload_rate(device) if gpu else ram_rate}
    disk = os.statvfs(folder)
    return {"format": FORMAT, "host": socket.gethostname(), "device": facts,
            "ram": {"total_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "free_bytes": free_memory(), "bytes_s": ram_rate},
            "disk": {"folder": str(folder), "free_bytes": disk.f_bavail * disk.f_frsize, "bytes_s": disk_rate(folder)},
            "link": {"loopback_bytes_s": loopback_rate()}}


def matrix_rates(device: torch.device) -> dict[str, float]:
    """FLOP/s of a square matrix product, by numeric type; types it cannot compute in are left out."""
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
            continue  # emulated before Ampere
        try:
            rates[name] = _matrix_rate(device, dtype)
        except RuntimeError:
            continue
    return rates


def _matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The size is such that one product takes a while on a GPU, and not for ever on a CPU that emulates the type."""
    n = 8192 if device.type == "cuda" else 512
    while True:
        a, b = torch.randn(n, n).to(device, dtype), torch.randn(n, n).to(device, dtype)
        seconds = _best(lambda: a @ b, device)
        if seconds > 0.05 or n >= (8192 if device.type == "cuda" else 2048):
            return 2 * n**3 / seconds
        n *= 2


def _copy_rate(device: torch.device, nbytes: int) -> float:
    """Bytes copied per second within one memory (each is read and written)."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    into = torch.empty_like(source)
    return nbytes / _best(lambda: into.copy_(source), device)


def _upload_rate(device: torch.device) -> float:
    """From page-locked host memory."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8).pin_memory()
    into = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    return COPY_BYTES / _best(lambda: into.copy_(source, non_blocking=True), device)


def disk_rate(folder: Path) -> float:
    """Reading a temporary file past the page cache where the file system can, after dropping it from the cache where not."""
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
    """One TCP stream between two threads of this machine: what ranks of one host have on a CPU. Between hosts, the hostfile's link_gbps counts."""
    chunk = bytes(1 << 20)
    with socket.create_server(("127.0.0.1", 0)) as server:
        def send() -> None:
            with socket.create_connection(server.getsockname(), timeout=10) as out:
                for _ in range(LINK_BYTES // len(chunk)):
                    out.sendall(chunk)

        sender = threading.Thread(target=send)
        sender.start()
        server.settimeout(10)
        into, buffer, received = server.accept()[0], bytearray(1 << 20), 0
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
    end, best = time.perf_counter() + MEASURE_S, float("inf")
    while time.perf_counter() < end:
        best = min(best, once())
    return best
