"""DeepSpeed's compiled operators: which ones a run needs, whether this machine can build them, and the build,
which takes minutes.

The only one is `async_io`, with which stock execution reads and writes NVMe. Optimizers are torch's own, and
streamed tiers read their files themselves.
"""

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from fedspeed.cluster.compilers import missing_for_async_io, ninja
from fedspeed.config.deepspeed_rules import at
from fedspeed.errors import FedSpeedError
from fedspeed.log import LOG

DEAD_BUILD_S = 300.0  # a build in whose folder no file has changed for so long has been killed
PARTS = ("pin_memory", "async_io")  # the libraries that are built for async_io, in this order
OFFLOADS = ("zero_optimization.offload_param", "zero_optimization.offload_optimizer")


def needs_async_io(tier: str, ds_config: Mapping) -> list[str]:
    """Return the keys of the DeepSpeed section for which a tier needs async_io."""
    return [
        f"deepspeed.{key}.device=nvme"
        for key in OFFLOADS
        if tier == "stock" and at(ds_config, f"{key}.device") == "nvme"
    ]


def check_operators(tier: str, ds_config: Mapping) -> None:
    """Check that this machine can build the operators that a tier needs.

    Raises:
        FedSpeedError: it cannot; the message says what is missing and how to install it.
    """
    keys = needs_async_io(tier, ds_config)
    if keys and (lacks := missing_for_async_io()):
        raise FedSpeedError(
            f"{', '.join(keys)} in stock execution needs DeepSpeed's async_io, which is built when it is "
            "first used, and this machine lacks for it\n    "
            + "\n    ".join(map(str, lacks))
            + "\n  or leave engine.tier=auto, which needs none of it where something of the model is frozen, "
            "or take deepspeed.base=zero3_offload.json"
        )


def build_operators(tier: str, ds_config: Mapping) -> None:
    """Build the operators that a tier needs and that are not built yet, and log that. One process of a
    machine builds, and the others wait for it.

    Raises:
        FedSpeedError: a compiler or library is missing, the build fails, or an earlier build was killed and
            left its lock file.
    """
    check_operators(tier, ds_config)
    if not needs_async_io(tier, ds_config):
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    _ninja_on_path()
    with _build_lock(build_folder(PARTS[0]).parent) as folder:
        for part in PARTS:
            await_build(part)
        missing = [part for part in PARTS if not (folder / part / f"{part}.so").exists()]
        if missing:
            LOG.info(
                f"building DeepSpeed's {' and '.join(missing)} in {folder}: once on this machine, about six "
                "minutes of a core"
            )
        begin = time.monotonic()
        try:
            AsyncIOBuilder().load(verbose=False)
        except (RuntimeError, OSError, ImportError) as error:
            raise FedSpeedError(
                f"DeepSpeed's async_io could not be built in {folder}: {_last_lines(error)}; mend that, or "
                "set another engine.tier"
            ) from error
        if missing:
            LOG.info(f"built in {time.monotonic() - begin:.0f} s")


def build_folder(operator: str) -> Path:
    """Return the folder in which torch builds an operator."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(operator, verbose=False))


@contextmanager
def _build_lock(folder: Path) -> Iterator[Path]:
    """Let one process of the machine enter at a time, so that only the one that builds logs it. The kernel
    releases the lock of a process that dies.
    """
    with (folder / ".fedspeed").open("w") as file:
        # Some network file systems have no locks. Then only torch's own lock keeps builds apart.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield folder


def await_build(operator: str) -> None:
    """Wait while another process builds an operator. torch waits too, but forever if a killed build has left
    its lock file.

    Raises:
        FedSpeedError: there is a lock file without a build in progress.
    """
    folder = build_folder(operator)
    lock = folder / "lock"
    while lock.exists():
        newest = max((path.stat().st_mtime for path in folder.iterdir()), default=0.0)
        if time.time() - newest > DEAD_BUILD_S and not _is_open(lock):
            raise FedSpeedError(
                f"{lock}: left by a build of DeepSpeed's {operator} that was killed; delete the file"
            )
        time.sleep(1)


def _is_open(file: Path) -> bool:
    """Tell whether a process of this machine has the file open, as a build in progress has its lock file."""
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(entry) == str(file.resolve()):
                return True
    return False


def _ninja_on_path() -> None:
    """Put the folder of ninja on PATH, where torch looks for it. The virtual environment's folder is on PATH
    only if it is activated.
    """
    if folder := os.path.dirname(ninja(os.environ) or ""):
        folders = os.environ.get("PATH", "").split(os.pathsep)
        os.environ["PATH"] = os.pathsep.join(folders if folder in folders else [*folders, folder])


def _last_lines(error: Exception) -> str:
    return (
        " / ".join(line.strip() for line in str(error).splitlines()[-3:] if line.strip())
        or type(error).__name__
    )
