"""The speed of the card's bus, copy engines and matrix units, on which streaming a base depends."""

import json
import os
import statistics
import time

from benchmarks.gpu import card
from benchmarks.gpu.engines import Scene
from benchmarks.gpu.record import LeftOut
from fedspeed.files import write_atomically

BLOCK = 466 << 20  # bytes of a block of 7B in 16 bits
INPUT = 29 << 20  # of a block's input, 4 096 tokens of 7B
REPEAT = 4
PROBE_FILE = "probe.json"
MATRICES = (
    (8192, 8192, 8192),
    (512, 3584, 18944),
    (2048, 3584, 18944),
    (4096, 3584, 18944),
    (880, 3584, 152064),
)


def run(scene: Scene) -> None:
    """Measure the host, write a probe for the planner, without which nothing is predicted, then copies and
    products.
    """
    record = scene.record
    with record.guarded("host"):
        record.note("host", host())
    with record.guarded("probe"):
        if scene.dry:
            raise LeftOut("predictions of a dry run are for a published card")
        from fedspeed.engine.probe import probe

        facts = probe(scene.folder)
        write_atomically(scene.out / PROBE_FILE, json.dumps(facts).encode())
        record.note(
            "probe",
            {
                "TFLOP/s": {name: round(rate / 1e12) for name, rate in facts["device"]["flops"].items()},
                "upload GB/s": round(facts["device"]["host_bytes_s"] / 1e9, 1),
            },
        )
    for name, measured in MEASURED.items():
        with record.guarded(name):
            if scene.dry and measured is not matrix_products:
                raise LeftOut("there is no card whose bus could be measured")
            record.note(name, measured(scene.dry))


def host() -> dict:
    """Measure the properties of the machine that loading depends on."""
    import resource

    with open("/proc/meminfo") as file:
        fields = dict(line.split(":") for line in file)
    gib = {name: int(fields[name].split()[0]) >> 20 for name in ("MemTotal", "MemAvailable")}
    lockable = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return gib | {
        "kernel": os.uname().release,
        "lockable": "all" if lockable == resource.RLIM_INFINITY else lockable,
    }


def page_locked(dry: bool) -> dict:
    """GB/s up and down from memory that PyTorch has page-locked, and seconds that locking took."""
    import torch

    begin = time.perf_counter()
    memory = torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True)
    seconds = time.perf_counter() - begin
    memory.fill_(1)
    slot = torch.empty(BLOCK, dtype=torch.uint8, device="cuda")
    return {"lock s": round(seconds, 3), "up GB/s": _rate(slot, memory), "down GB/s": _rate(memory, slot)}


def ordinary(dry: bool) -> dict:
    """GB/s up from memory that is not page-locked."""
    import torch

    slot = torch.empty(BLOCK, dtype=torch.uint8, device="cuda")
    return {"up GB/s": _rate(slot, torch.ones(BLOCK, dtype=torch.uint8), 2)}


def registered(dry: bool) -> dict:
    """Allocate shared memory and page-lock it afterwards, as the engine's tiers do."""
    import mmap

    import torch

    from fedspeed.engine.base.page_locks import PageLocks

    size = 4 << 30
    file = os.memfd_create("link")
    try:
        begin = time.perf_counter()
        os.posix_fallocate(file, 0, size)
        reserved = time.perf_counter()
        memory = torch.frombuffer(mmap.mmap(file, size, mmap.MAP_SHARED), dtype=torch.uint8)
        locks = PageLocks(memory, [(0, size)], "the phase link")
        locked = time.perf_counter()
        slot = torch.empty(BLOCK, dtype=torch.uint8, device="cuda")
        rate = _rate(slot, memory[:BLOCK])
        held = locks.locked
        locks.close()
    finally:
        os.close(file)
    return {
        "page-locked": held,
        "reserve s/GiB": round((reserved - begin) / 4, 3),
        "lock s/GiB": round((locked - reserved) / 4, 3),
        "up GB/s": rate,
    }


def head_of_line(dry: bool) -> dict:
    """Milliseconds that a block's input takes on its own stream while a block is loaded on another one."""
    import torch

    block = torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True)
    slot = torch.empty(BLOCK, dtype=torch.uint8, device="cuda")
    waits = torch.empty(INPUT, dtype=torch.uint8, pin_memory=True)
    room = torch.empty(INPUT, dtype=torch.uint8, device="cuda")
    found = {"alone": _latency([], room, waits)}
    for pieces in (1, 16, 64):
        copies = list(zip(slot.tensor_split(pieces), block.tensor_split(pieces)))
        found[f"up behind {pieces} pieces"] = _latency(copies, room, waits)
    found["down beside a load"] = _latency([(slot, block)], waits, room)
    return {f"{name} ms": value for name, value in found.items()}


def both_ways(dry: bool) -> dict:
    """GB/s of each direction while both are busy."""
    import torch

    up = torch.cuda.Stream()
    down = torch.cuda.Stream()
    slot = torch.empty(BLOCK, dtype=torch.uint8, device="cuda")
    other = torch.empty(BLOCK, dtype=torch.uint8, device="cuda")
    source = torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True)
    sink = torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(REPEAT):
        with torch.cuda.stream(up):
            slot.copy_(source, non_blocking=True)
        with torch.cuda.stream(down):
            sink.copy_(other, non_blocking=True)
    torch.cuda.synchronize()
    return {"GB/s": round(REPEAT * BLOCK / (time.perf_counter() - begin) / 1e9, 1)}


def matrix_products(dry: bool) -> dict:
    """TFLOP/s of bf16 products of the shapes that a step is made of."""
    shapes = ((64, 64, 64),) if dry else MATRICES
    return {"x".join(map(str, shape)): _flops(shape, dry) for shape in shapes}


MEASURED = {
    "page-locked memory": page_locked,
    "shared memory, locked afterwards": registered,
    "ordinary memory": ordinary,
    "head of line": head_of_line,
    "both ways": both_ways,
    "matrix products, TFLOP/s": matrix_products,
}


def _rate(into, source, repeat: int = REPEAT) -> float:
    """GB/s of a copy."""
    import torch

    into.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeat):
        into.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return round(repeat * source.numel() / (time.perf_counter() - begin) / 1e9, 1)


def _latency(ahead: list, into, source) -> float:
    """Median milliseconds of a copy on one stream, begun when those of `ahead` were asked for on another."""
    import torch

    first = torch.cuda.Stream()
    second = torch.cuda.Stream()
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(first):
            for slot, block in ahead:
                slot.copy_(block, non_blocking=True)
        with torch.cuda.stream(second):
            begin.record()
            into.copy_(source, non_blocking=True)
            end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return round(statistics.median(times), 2)


def _flops(shape: tuple[int, int, int], dry: bool) -> float:
    import torch

    m, k, n = shape
    device = "cpu" if dry else "cuda"
    x = torch.ones(m, k, device=device, dtype=torch.bfloat16)
    w = torch.ones(n, k, device=device, dtype=torch.bfloat16).T
    for _ in range(3):
        x @ w
    card.synchronise(dry)
    begin = time.perf_counter()
    for _ in range(10):
        x @ w
    card.synchronise(dry)
    return round(10 * 2 * m * k * n / (time.perf_counter() - begin) / 1e12, 3)
