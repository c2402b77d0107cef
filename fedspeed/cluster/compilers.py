"""What this machine lacks to build DeepSpeed's operators, which happens when they are first used.

Found without torch; nothing is changed.
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

_COMPILE_S = 60.0
# The function that DeepSpeed itself tries to link, and the header that its sources include.
_AIO_PROGRAM = (
    "#include <libaio.h>\nint main(void) { io_context_t context = 0; return io_setup(1, &context); }\n"
)


@dataclass(frozen=True)
class MissingRequirement:
    """Something that is not installed, and how to install it."""

    name: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.remedy}"


def missing_for_async_io(env: Mapping[str, str] = os.environ) -> list[MissingRequirement]:
    """Return what is missing for `async_io`, DeepSpeed's operator for NVMe; nothing if it is already built
    in.

    Args:
        env: CC, CXX, CFLAGS, LDFLAGS, CUDA_HOME and PATH are read, as DeepSpeed's build does.
    """
    return [] if _is_built_in("async_io") else [*_missing_for_any(env), *_missing_libaio(env)]


def _missing_for_any(env: Mapping[str, str]) -> list[MissingRequirement]:
    """Return what is missing for any operator."""
    missing = []
    if not _program(env.get("CXX", "c++"), env):
        missing.append(
            MissingRequirement(
                f"a C++ compiler (`{env.get('CXX', 'c++')}`)", "apt install g++, or name another with CXX"
            )
        )
    if not ninja(env):
        missing.append(MissingRequirement("ninja", "pip install ninja"))
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        missing.append(MissingRequirement("Python.h", "apt install python3-dev"))
    if env.get("DS_ACCELERATOR") != "cpu" and visible_gpus(env) and not _cuda_toolkit(env):
        missing.append(
            MissingRequirement("the CUDA toolkit (nvcc)", "set CUDA_HOME to it, or put its nvcc on PATH")
        )
    return missing


def _missing_libaio(env: Mapping[str, str]) -> list[MissingRequirement]:
    """Return the C compiler or libaio if they are missing.

    As DeepSpeed does, this links a program with the C compiler that Python was built with.
    """
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
            done = subprocess.run(
                command, env=dict(env), capture_output=True, timeout=_COMPILE_S, check=False
            )
        except (OSError, subprocess.SubprocessError):
            return [
                MissingRequirement(f"a C compiler that works (`{compiler}` does not)", "name another with CC")
            ]
    if done.returncode == 0:
        return []
    remedy = "apt install libaio-dev, or CFLAGS=-I... LDFLAGS=-L... where it is elsewhere"
    return [MissingRequirement("libaio with its header", remedy)]


def ninja(env: Mapping[str, str]) -> str | None:
    """Return the path of ninja: on PATH, or next to this Python if its environment is not active."""
    beside_python = str(Path(sys.executable).parent)
    return shutil.which("ninja", path=env.get("PATH")) or shutil.which("ninja", path=beside_python)


def _program(command: str, env: Mapping[str, str]) -> str | None:
    """Return the path of the program that a command line begins with."""
    return shutil.which((shlex.split(command) or [""])[0], path=env.get("PATH"))


def _cuda_toolkit(env: Mapping[str, str]) -> bool:
    return bool(
        env.get("CUDA_HOME")
        or env.get("CUDA_PATH")
        or _program("nvcc", env)
        or Path("/usr/local/cuda").exists()
    )


def _is_built_in(operator: str) -> bool:
    """Return whether DeepSpeed was installed with this operator (DS_BUILD_OPS and the like).

    Its list of operators is read from the file, since importing it takes seconds.
    """
    package = find_spec("deepspeed")
    file = None
    if package and package.origin:
        file = Path(package.origin).parent / "git_version_info_installed.py"
    if file is None or not file.is_file():
        return False
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("installed_ops="):
            return bool(ast.literal_eval(line.partition("=")[2]).get(operator))
    return False
