"""What this machine offers to its ranks: GPUs and cores, found without torch and without starting a CUDA context."""

import math
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

_DRIVER_FOLDER = Path("/proc/driver/nvidia/gpus")
_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")


def visible_gpus(env: Mapping[str, str]) -> int:
    """Number of CUDA devices a process with this environment would see.

    CUDA_VISIBLE_DEVICES counts only up to its first invalid entry, as in CUDA itself.
    """
    installed = installed_gpus()
    chosen = env.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not installed:
        return installed
    count = 0
    for entry in chosen.split(","):
        entry = entry.strip()
        if not entry or entry.startswith("-") or (entry.isdecimal() and int(entry) >= installed):
            break
        count += 1
    return count


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
    """Bytes of RAM that can be had without swapping, also by the limit of the control group (container, scheduler) this process is in."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except OSError:
        pass  # no control groups of version 2, or no limit at the root
    return free
