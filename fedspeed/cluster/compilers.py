"""What this machine lacks to build DeepSpeed's operators, which is done when they are first used. Found
without torch; changes nothing.
"""

import ast
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fedspeed.cluster.devices import visible_gpus

_TRY_S = 60.0
# What DeepSpeed itself tries, and the header that its sources include.
_AIO_PROGRAM = (
    "#include <libaio.h>\nint main(void) { io_context_t context = 0; return io_setup(1, &context); }\n"
)


@dataclass(frozen=True)
class MissingRequirement:
    """Something that is not there, and how to get it."""

    name: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.remedy}"


def missing_for_async_io(env: Mapping[str, str] = os.environ) -> list[MissingRequirement]:
    """What is missing here for `async_io`, DeepSpeed's way to NVMe; nothing where DeepSpeed was installed
    with it.

    Args:
        env: CC, CXX, CFLAGS, LDFLAGS, CUDA_HOME and PATH are heeded, as its build heeds them.
    """
    return [] if _installed("async_io") else [*_lacks_for_any(env), *_lacks_of_libaio(env)]


def _lacks_for_any(env: Mapping[str, str]) -> list[MissingRequirement]:
    lacks = []
    if not _program(env.get("CXX", "c++"), env):
        lacks.append(
            MissingRequirement(
                f"a C++ compiler (`{env.get('CXX', 'c++')}`)", "apt install g++, or name another with CXX"
            )
        )
    if not ninja(env):
        lacks.append(MissingRequirement("ninja", "pip install ninja"))
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        lacks.append(MissingRequirement("Python.h", "apt install python3-dev"))
    if env.get("DS_ACCELERATOR") != "cpu" and visible_gpus(env) and not _cuda_toolkit(env):
        lacks.append(
            MissingRequirement("the CUDA toolkit (nvcc)", "set CUDA_HOME to it, or put its nvcc on PATH")
        )
    return lacks


def _lacks_of_libaio(env: Mapping[str, str]) -> list[MissingRequirement]:
    """DeepSpeed looks for the library by linking a program with Python's own C compiler, and so does this."""
    compiler = env.get("CC") or sysconfig.get_config_var("CC") or "cc"
    if not _program(compiler, env):
        return [
            MissingRequirement(f"a C compiler (`{compiler}`)", "apt install gcc, or name another with CC")
        ]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "try.c"
        source.write_text(_AIO_PROGRAM, encoding="utf-8")
        command = [
            *shlex.split(compiler),
            *shlex.split(env.get("CFLAGS", "")),
            str(source),
            "-o",
            str(source.with_suffix("")),
            *shlex.split(env.get("LDFLAGS", "")),
            "-laio",
        ]
        try:
            done = subprocess.run(command, env=dict(env), capture_output=True, timeout=_TRY_S, check=False)
        except (OSError, subprocess.SubprocessError):
            return [
                MissingRequirement(f"a C compiler that works (`{compiler}` does not)", "name another with CC")
            ]
    return (
        []
        if done.returncode == 0
        else [
            MissingRequirement(
                "libaio with its header",
                "apt install libaio-dev, or CFLAGS=-I... LDFLAGS=-L... where it is elsewhere",
            )
        ]
    )


def ninja(env: Mapping[str, str]) -> str | None:
    """The path of ninja: on PATH, or beside this Python, whose virtual environment need not be activated."""
    return shutil.which("ninja", path=env.get("PATH")) or shutil.which(
        "ninja", path=str(Path(sys.executable).parent)
    )


def _program(command: str, env: Mapping[str, str]) -> str | None:
    """The path of the program that a command line begins with."""
    return shutil.which((shlex.split(command) or [""])[0], path=env.get("PATH"))


def _cuda_toolkit(env: Mapping[str, str]) -> bool:
    return bool(
        env.get("CUDA_HOME")
        or env.get("CUDA_PATH")
        or _program("nvcc", env)
        or Path("/usr/local/cuda").exists()
    )


def _installed(operator: str) -> bool:
    """Whether DeepSpeed was installed with this operator (DS_BUILD_OPS and the like). Read, not imported:
    that would take seconds.
    """
    package = find_spec("deepspeed")
    file = (
        Path(package.origin).parent / "git_version_info_installed.py" if package and package.origin else None
    )
    if file is None or not file.is_file():
        return False
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("installed_ops="):
            return bool(ast.literal_eval(line.partition("=")[2]).get(operator))
    return False
