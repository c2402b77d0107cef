"""What this machine offers to its ranks: GPUs and cores, found without torch and without starting a CUDA
context.
"""

import math
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator, Mapping, MutableMapping
from itertools import takewhile
from pathlib import Path

_DRIVER_FOLDER = Path("/proc/driver/nvidia/gpus")
# Of AMD, Ascend and Habana, which DeepSpeed looks for itself.
_OTHER_ACCELERATORS = (Path("/dev/kfd"), Path("/dev/davinci_manager"), Path("/dev/hl0"))
_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")


_MIG = "MIG-"  # a name that begins so is an instance: a part of a card
_ALLOCATOR = "PYTORCH_ALLOC_CONF"
# Names under which torch reads the same: the second is what it called the first before 2.9.
_ALLOCATORS = (_ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def visible_gpus(env: Mapping[str, str]) -> int:
    """Number of CUDA devices that the ranks of a machine can have with this environment.

    They are those that one process would see; of MIG instances all that are named, though a process would see
    the first only (see `rank_devices`).
    """
    installed = installed_gpus()
    chosen = env.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return installed
    named = chosen_gpus(chosen, installed)
    return named if installed and chosen.startswith(_MIG) else min(installed, named)


def computing_gpus(env: Mapping[str, str]) -> int:
    """Number of CUDA devices that ranks with this environment compute on: none where they were told to take
    the CPU.
    """
    return 0 if env.get("DS_ACCELERATOR") == "cpu" else visible_gpus(env)


def rank_devices(env: Mapping[str, str], local_rank: int) -> dict[str, str]:
    """What a rank's environment needs beside its supervisor's to see its device: of several MIG instances
    one, since CUDA shows a process no more than the first of them. All other devices are seen by every rank,
    which takes its own by number.
    """
    chosen = env.get("CUDA_VISIBLE_DEVICES", "")
    if not chosen.startswith(_MIG) or not (count := chosen_gpus(chosen, 0)):
        return {}
    return {"CUDA_VISIBLE_DEVICES": chosen.split(",")[local_rank % count]}


def choose_allocator(env: MutableMapping[str, str]) -> None:
    """Let torch grow its pieces of GPU memory in place, where ranks compute on one and nobody has configured
    its allocator.

    Micro-batches and blocks have many sizes, and pieces of fixed sizes would leave holes between them. To be
    called before torch starts CUDA.
    """
    if computing_gpus(env) and not any(env.get(name) for name in _ALLOCATORS):
        env[_ALLOCATOR] = "expandable_segments:True"


def chosen_gpus(text: str, installed: int) -> int:
    """How many devices a value of CUDA_VISIBLE_DEVICES lets a process see, as CUDA and torch read it.

    Counting ends before the first entry that is no device: an index that is not there, a word (`NoDevFiles`,
        `none`, `void`), a negative
    number. A device named twice means none at all. Of an index only the digits at its beginning count. Ids of
    devices (`GPU-...`, `MIG-...`) are taken at their word.

    Args:
        installed: number of devices of this machine.
    """
    prefix = text[:4]
    named = prefix in ("GPU-", "MIG-")
    found: list[str | int] = []
    for entry in text.split(","):
        device = entry if named else _leading_number(entry.strip())
        if device in found:
            return 0
        if not entry.startswith(prefix) if named else device < 0:
            break
        found.append(device)
    valid = takewhile(lambda device: named or device < installed, found)
    return len(list(valid))


def _leading_number(text: str) -> int:
    """The whole number that a text begins with; -1 where it begins with none."""
    match = re.match(r"[+-]?\d+", text, re.ASCII)
    return int(match[0]) if match else -1


def choose_accelerator(env: MutableMapping[str, str]) -> None:
    """Tell DeepSpeed that this machine computes on its CPU, where no accelerator can be seen and nobody has
    said otherwise.

    Left to itself it would warn on every rank that it has found none. Where NVIDIA's driver knows a GPU, that
    warning matters, and stays.
    """
    if not env.get("DS_ACCELERATOR"):
        env.pop("DS_ACCELERATOR", None)
        if not visible_gpus(env) and not any(path.exists() for path in _OTHER_ACCELERATORS):
            env["DS_ACCELERATOR"] = "cpu"


def installed_gpus() -> int:
    """GPUs that NVIDIA's driver knows: its /proc folder, else `nvidia-smi -L` (WSL has no such folder)."""
    if _DRIVER_FOLDER.is_dir():
        return sum(1 for _ in _DRIVER_FOLDER.iterdir())
    tool = shutil.which("nvidia-smi")
    if not tool:
        return 0
    try:
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listing.splitlines())


def usable_cores() -> int:
    """Cores this process may use: its affinity, and the quota of its container (cgroup v2), rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA_FILE.read_text(encoding="utf-8").split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def free_memory() -> int:
    """Bytes of RAM that can be had without swapping, also by the limits of this process: of its control
    groups (container, scheduler), and of its address space (ulimit -v).
    """
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    for limit, used in _group_limits(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup")):
        free = min(free, limit - used)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free = min(
            free, limit - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        )
    return max(0, free)


def _group_limits(groups: str, root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) bytes of the control groups that this process is in and of those above them, in both
    versions.

    Args:
        groups: content of /proc/self/cgroup: lines of `number:controllers:/path`; version 2 has number 0 and
            no controllers.
    """
    for line in groups.splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base = root
            names = ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = base / path.lstrip("/")
        while folder != base.parent:
            try:
                limit, used = ((folder / name).read_text().strip() for name in names)
                if limit != "max":
                    yield int(limit), int(used)
            except OSError:
                pass  # mounted elsewhere, or the root, which has no limit
            folder = folder.parent
