"""`fedspeed doctor`: what this machine has, what it lacks, and how to get it. Looks only; imports no torch
and changes nothing.
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
    """One finding. `remedy` is empty if `ok`; something a run can do without still is not `ok`, and its
    remedy says who needs it.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def checks() -> list[Check]:
    """All findings about this machine, the working folder and the Python that runs."""
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


def render(findings: list[Check]) -> str:
    """Aligned text: a mark, the name, what was found, and below it the remedy of what is missing."""
    width = max((len(check.name) for check in findings), default=0)
    lines = []
    for check in findings:
        lines.append(f"{'ok  ' if check.ok else 'MISS'}  {check.name:<{width}}  {check.detail}")
        if check.remedy:
            lines.append(f"{'':6}{'':<{width}}  -> {check.remedy}")
    missing = sum(not check.ok for check in findings)
    lines.append(f"{len(findings) - missing} of {len(findings)} checks passed")
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
    """The pinned packages against what is installed. An installation without its requirements.txt (a wheel)
    has pip's word for it.
    """
    if not _REQUIREMENTS.is_file():
        return []
    return [
        _package(name, wanted) for name, wanted in pinned(_REQUIREMENTS.read_text(encoding="utf-8")).items()
    ]


def pinned(requirements: str) -> dict[str, str]:
    """Name -> version of the `name==version` lines; extras, comments and other lines are passed over."""
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
    return (
        replace(
            found,
            detail=f"{found.detail} (more than {usable_cores()} ranks here: mpirun --oversubscribe{as_root})",
        )
        if found.ok
        else found
    )


def _ssh() -> Check:
    found = _tool("ssh", "ssh", "starting ranks on other hosts needs it", "apt install openssh-client")
    if not found.ok or _takes_logins():
        return found
    # No fault: only deepspeed wants it of the machine itself, and only with a hostfile.
    return replace(
        found,
        detail=f"{found.detail} (no login here without a password, which `deepspeed --hostfile` wants even "
        "for this machine: "
        "deepspeed --num_gpus N does without, and so does --no_ssh_check --master_addr 127.0.0.1)",
    )


def _takes_logins() -> bool:
    """Whether ssh reaches this machine itself without asking anything."""
    command = [
        "ssh",
        "-o",
        "BatchMode=yes",
        "-o",
        "StrictHostKeyChecking=yes",
        "-o",
        f"ConnectTimeout={_LOGIN_S}",
        "localhost",
        "true",
    ]
    try:
        return (
            subprocess.run(
                command, capture_output=True, stdin=subprocess.DEVNULL, timeout=2 * _LOGIN_S, check=False
            ).returncode
            == 0
        )
    except (OSError, subprocess.SubprocessError):
        return False


def _version(path: str, option: str) -> str:
    """The first number with a dot that the tool prints, or nothing."""
    if not option:
        return ""
    try:
        said = subprocess.run([path, option], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    match = re.search(r"\d+(?:\.\d+)+", said)
    return match[0] if match else ""


def _async_io() -> Check:
    lacks = missing_for_async_io()
    if not lacks:
        return Check("async_io", True, "DeepSpeed has it, or can build it when it is first used")
    return Check(
        "async_io",
        False,
        f"cannot be built without {' and '.join(lack.name for lack in lacks)}",
        f"{'; '.join(lack.remedy for lack in lacks)}. DeepSpeed's own NVMe offload needs it "
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
    # No fault: a run that needs more is a rare one.
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
