"""What this machine offers to its ranks: GPUs, cores and memory, found without torch and without a CUDA
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
# Device files of AMD, Ascend and Habana, whose accelerators DeepSpeed finds by itself.
_OTHER_ACCELERATORS = (Path("/dev/kfd"), Path("/dev/davinci_manager"), Path("/dev/hl0"))
_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")
# Prefix of the names of MIG instances, which are parts of a GPU.
_MIG = "MIG-"
_ALLOCATOR = "PYTORCH_ALLOC_CONF"
# All variables that configure torch's allocator: the second is the name of the first before torch 2.9.
_ALLOCATORS = (_ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def visible_gpus(env: Mapping[str, str]) -> int:
    """Return the number of CUDA devices that the ranks of a machine can use with this environment.

    These are the devices that one process would see; of MIG instances all that are named, although one
    process would see only the first (see `rank_devices`).
    """
    installed = installed_gpus()
    chosen = env.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return installed
    listed = chosen_gpus(chosen, installed)
    return listed if installed and chosen.startswith(_MIG) else min(installed, listed)


def computing_gpus(env: Mapping[str, str]) -> int:
    """Return the number of CUDA devices that ranks with this environment compute on; 0 with
    DS_ACCELERATOR=cpu.
    """
    return 0 if env.get("DS_ACCELERATOR") == "cpu" else visible_gpus(env)


def rank_devices(env: Mapping[str, str], local_rank: int) -> dict[str, str]:
    """Return what must be added to a rank's environment so that it sees its device.

    CUDA shows a process only the first of several MIG instances, so each rank is given one by name. All other
    devices are visible to every rank, which selects its own by number.
    """
    chosen = env.get("CUDA_VISIBLE_DEVICES", "")
    if not chosen.startswith(_MIG) or not (count := chosen_gpus(chosen, 0)):
        return {}
    return {"CUDA_VISIBLE_DEVICES": chosen.split(",")[local_rank % count]}


def choose_allocator(env: MutableMapping[str, str]) -> None:
    """Let torch's allocator grow its segments in place, where ranks use a GPU and nobody has configured it.

    Micro-batches and blocks have many sizes, and segments of fixed sizes would fragment. To be called before
    torch starts CUDA.
    """
    if computing_gpus(env) and not any(env.get(name) for name in _ALLOCATORS):
        env[_ALLOCATOR] = "expandable_segments:True"


def chosen_gpus(text: str, installed: int) -> int:
    """Return how many devices a value of CUDA_VISIBLE_DEVICES shows to a process, as CUDA and torch read it.

    Counting ends before the first entry that is no device: an index that does not exist, a word
    (`NoDevFiles`, `none`, `void`), a negative number. A device listed twice means none at all. Of an index,
    only the leading digits count. Ids of devices (`GPU-...`, `MIG-...`) are not verified.

    Args:
        installed: number of devices of this machine.
    """
    entries = text.split(",")
    prefix = text[:4]
    if prefix in ("GPU-", _MIG):
        ids = list(takewhile(lambda entry: entry.startswith(prefix), entries))
        return 0 if len(set(ids)) < len(ids) else len(ids)
    indices = list(takewhile(lambda index: index >= 0, (_leading_number(entry.strip()) for entry in entries)))
    if len(set(indices)) < len(indices):
        return 0
    return len(list(takewhile(lambda index: index < installed, indices)))


def _leading_number(text: str) -> int:
    """Return the whole number that a text begins with; -1 where it begins with none."""
    match = re.match(r"[+-]?\d+", text, re.ASCII)
    return int(match[0]) if match else -1


def choose_accelerator(env: MutableMapping[str, str]) -> None:
    """Tell DeepSpeed to compute on the CPU where no accelerator is visible and nobody has chosen one.

    Otherwise it would warn on every rank that it has found none. If NVIDIA's driver reports a GPU, that
    warning matters and is kept.
    """
    if not env.get("DS_ACCELERATOR"):
        env.pop("DS_ACCELERATOR", None)
        if not visible_gpus(env) and not any(path.exists() for path in _OTHER_ACCELERATORS):
            env["DS_ACCELERATOR"] = "cpu"


def installed_gpus() -> int:
    """Return the number of GPUs that NVIDIA's driver lists in /proc, else in `nvidia-smi -L` (WSL)."""
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
    """Return the cores this process may use: by affinity and container quota (cgroup v2), rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA_FILE.read_text(encoding="utf-8").split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def free_memory() -> int:
    """Return the bytes of RAM that this process can use without swapping.

    The limits of its control groups (container, scheduler) and of its address space (ulimit -v) count too.
    """
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    for limit, used in _group_limits(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup")):
        free = min(free, limit - used)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        free = min(free, limit - used)
    return max(0, free)


def _group_limits(groups: str, root: Path) -> Iterator[tuple[int, int]]:
    """Yield (limit, used) bytes of the control groups of this process and their ancestors, in both versions.

    Args:
        groups: content of /proc/self/cgroup: lines of `number:controllers:/path`. Version 2 has number 0 and
            no controllers.
        root: where control groups are mounted.
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
                limit, used = [(folder / name).read_text().strip() for name in names]
                if limit != "max":
                    yield int(limit), int(used)
            except OSError:
                pass  # mounted elsewhere, or the root, which has no limit
            folder = folder.parent
