"""`fedspeed doctor`: what this machine has, what it lacks, and how to get it. Imports no torch, changes
nothing.
"""

import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from fedspeed.cluster.compilers import missing_for_async_io
from fedspeed.cluster.devices import installed_gpus, usable_cores, visible_gpus

_GIB = 2**30
_LOGIN_S = 3
_OLDEST_PYTHON = (3, 11)
_REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"


@dataclass(frozen=True)
class Check:
    """The result of one check.

    `remedy` is empty if `ok`. What is missing is not `ok` even if a run may do without it; then the remedy
    says what needs it.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def checks() -> list[Check]:
    """Return the results of all checks of this machine, the working folder and this Python."""
    return [
        _python(),
        *_packages(),
        _mpirun(),
        _tool("pdsh", "pdsh", "deepspeed's default launcher for several hosts needs it", "apt install pdsh"),
        _ssh(),
        _tool(
            "g++",
            "C++ compiler",
            "DeepSpeed builds async_io with it, for NVMe offload of its own",
            "apt install g++",
            "-dumpfullversion",
        ),
        _tool("ninja", "ninja", "DeepSpeed builds async_io with it", "pip install ninja", "--version"),
        _async_io(),
        _cores(),
        _memory(),
        _shared_memory(),
        _locked_memory(),
        _disk(),
        _gpus(),
    ]


def render(results: list[Check]) -> str:
    """Return results as aligned text: a mark, the name and the detail, with a line for each remedy."""
    width = max((len(check.name) for check in results), default=0)
    lines = []
    for check in results:
        lines.append(f"{'ok  ' if check.ok else 'MISS'}  {check.name:<{width}}  {check.detail}")
        if check.remedy:
            lines.append(f"{'':6}{'':<{width}}  -> {check.remedy}")
    missing = sum(not check.ok for check in results)
    lines.append(f"{len(results) - missing} of {len(results)} checks passed")
    return "\n".join(lines)


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    wanted = ".".join(map(str, _OLDEST_PYTHON))
    ok = sys.version_info >= _OLDEST_PYTHON
    return Check(
        "Python",
        ok,
        f"{found} ({sys.executable})",
        "" if ok else f"install Python {wanted} or newer and make .venv with it",
    )


def _packages() -> list[Check]:
    """Compare installed packages with the pinned versions.

    Nothing is checked without requirements.txt: in a wheel, pip has checked the versions.
    """
    if not _REQUIREMENTS.is_file():
        return []
    return [
        _package(name, wanted) for name, wanted in pinned(_REQUIREMENTS.read_text(encoding="utf-8")).items()
    ]


def pinned(requirements: str) -> dict[str, str]:
    """Return name -> version of the `name==version` lines; other lines are skipped."""
    pins = re.findall(
        r"^\s*([A-Za-z0-9][\w.-]*)(?:\[[^\]]*\])?\s*==\s*([^\s;#]+)", requirements, re.MULTILINE
    )
    return dict(pins)


def _package(name: str, wanted: str) -> Check:
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, False, "not installed", f"pip install {name}=={wanted}")
    # A build tag such as +cpu names the same release.
    ok = found.split("+")[0] == wanted
    return Check(name, ok, found, "" if ok else f"tested with {wanted}: pip install {name}=={wanted}")


def _tool(command: str, name: str, why: str, remedy: str, version_option: str = "") -> Check:
    # Console scripts of the running Python count although its folder may not be on PATH.
    path = shutil.which(command) or shutil.which(command, path=str(Path(sys.executable).parent))
    if not path:
        return Check(name, False, f"`{command}` is not on PATH", f"{remedy}; {why}")
    return Check(name, True, f"{path} {_version(path, version_option)}".strip())


def _mpirun() -> Check:
    found = _tool("mpirun", "Open MPI", "mpirun starts", "pip install -r requirements.txt", "--version")
    allowed = all(
        os.environ.get(name) == "1" for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
    )
    as_root = "" if os.geteuid() or allowed else "; as root: mpirun --allow-run-as-root"
    if not found.ok:
        return found
    hint = f"more than {usable_cores()} ranks here: mpirun --oversubscribe{as_root}"
    return replace(found, detail=f"{found.detail} ({hint})")


def _ssh() -> Check:
    found = _tool("ssh", "ssh", "starting ranks on other hosts needs it", "apt install openssh-client")
    if not found.ok or _accepts_logins():
        return found
    # This is ok: only deepspeed logs in to the machine itself, and only with a hostfile.
    return replace(
        found,
        detail=f"{found.detail} (no login here without a password, which `deepspeed --hostfile` wants even "
        "for this machine: "
        "deepspeed --num_gpus N does without, and so does --no_ssh_check --master_addr 127.0.0.1)",
    )


def _accepts_logins() -> bool:
    """Return whether ssh can log in to this machine without a password."""
    options = ("BatchMode=yes", "StrictHostKeyChecking=yes", f"ConnectTimeout={_LOGIN_S}")
    command = ["ssh", *(part for option in options for part in ("-o", option)), "localhost", "true"]
    try:
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, timeout=2 * _LOGIN_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0


def _version(path: str, option: str) -> str:
    """Return the first number with a dot that the tool prints, or an empty text."""
    if not option:
        return ""
    try:
        output = subprocess.run(
            [path, option], capture_output=True, text=True, timeout=10, check=False
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    match = re.search(r"\d+(?:\.\d+)+", output)
    return match[0] if match else ""


def _async_io() -> Check:
    missing = missing_for_async_io()
    if not missing:
        return Check("async_io", True, "DeepSpeed has it, or can build it when it is first used")
    return Check(
        "async_io",
        False,
        f"cannot be built without {' and '.join(each.name for each in missing)}",
        f"{'; '.join(each.remedy for each in missing)}. DeepSpeed's own NVMe offload needs it "
        "(engine.tier=stock), engine.tier=nvme does not",
    )


def _cores() -> Check:
    flags = set()
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("flags"):
            flags = set(line.partition(":")[2].split())
            break
    types = [name for name, flag in (("fp16", "avx512_fp16"), ("bf16", "avx512_bf16")) if flag in flags]
    arithmetic = (
        f"native {' and '.join(types)} arithmetic (AVX-512)"
        if types
        else "16-bit types only emulated: fp32 is faster on this CPU"
    )
    return Check("CPU", True, f"{usable_cores()} usable cores, {arithmetic}")


def _memory() -> Check:
    sizes = {
        key: int(rest.split()[0]) * 1024
        for key, _, rest in (line.partition(":") for line in _lines("/proc/meminfo"))
        if rest.split()
    }
    total = sizes.get("MemTotal", 0)
    free = sizes.get("MemAvailable", 0)
    ok = free >= 2 * _GIB
    remedy = "" if ok else "end other programs: the quickstart's ranks need about 2 GiB"
    return Check("RAM", ok, f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB available", remedy)


def _shared_memory() -> Check:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check(
            "/dev/shm",
            False,
            "does not exist",
            "mount a tmpfs there; NCCL and gloo exchange data of one machine through it",
        )
    size = shutil.disk_usage(folder).total
    ok = size >= _GIB
    remedy = "" if ok else "give the container more (docker run --shm-size=8g); NCCL needs it"
    return Check("/dev/shm", ok, f"{size / _GIB:.1f} GiB", remedy)


def _locked_memory() -> Check:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return Check("locked memory", True, "unlimited")
    # This is ok: few runs need more.
    hint = "" if limit >= _GIB else " (pinned offload buffers and InfiniBand need more: ulimit -l unlimited)"
    return Check("locked memory", True, f"{limit / _GIB:.2f} GiB{hint}")


def _disk() -> Check:
    usage = shutil.disk_usage(Path.cwd())
    ok = usage.free >= 10 * _GIB and os.access(Path.cwd(), os.W_OK)
    remedy = (
        ""
        if ok
        else "runs are written to ./runs: choose a folder with 10 GiB free and write permission "
        "(run.out=FOLDER)"
    )
    return Check("disk here", ok, f"{usage.free / _GIB:.0f} GiB free in {Path.cwd()}", remedy)


def _gpus() -> Check:
    count = installed_gpus()
    seen = visible_gpus(os.environ)
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not count:
        return Check("GPUs", True, "none: ranks compute on the CPU")
    found = f"{count}: {', '.join(_gpu_names()) or 'names unknown'}"
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return Check("GPUs", True, f"{found}; ranks compute on the CPU all the same (DS_ACCELERATOR=cpu)")
    if not seen:
        return Check(
            "GPUs",
            False,
            f"{found}; CUDA_VISIBLE_DEVICES={chosen} shows none of them",
            "unset it, or name devices that are there (`nvidia-smi -L`)",
        )
    shown = "" if chosen is None else f"; CUDA_VISIBLE_DEVICES={chosen} shows {seen}"
    return Check(
        "GPUs",
        True,
        f"{found}{shown}; a rank takes one, and `python launch.py` starts up to {seen} of itself",
    )


def _gpu_names() -> list[str]:
    names = []
    for folder in sorted(Path("/proc/driver/nvidia/gpus").glob("*")):
        names += [
            line.partition(":")[2].strip()
            for line in _lines(str(folder / "information"))
            if line.startswith("Model")
        ]
    return names


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
