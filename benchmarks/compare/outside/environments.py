"""An environment of its own for each system: made once, known by a hash of what is installed in it."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedspeed.errors import FedSpeedError

STAMP = "made.json"  # written last: without it an environment is half made
LIMIT_S = 1800  # of one call of pip
TAIL = 1500


class InstallError(FedSpeedError):
    """An environment could not be made."""


@dataclass(frozen=True)
class Environment:
    """An environment that has been made.

    Attributes:
        key: of its requirements. seconds: that making it took. packages: number installed; version: of the
            system's own package.
    """

    key: str
    seconds: float
    packages: int
    version: str


def key_of(installs: Sequence[Sequence[str]]) -> str:
    """Return the key of an environment: a hash of its requirements in their order and the Python version."""
    whole = json.dumps([list(sys.version_info[:2]), [list(some) for some in installs]])
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def interpreter(folder: Path) -> Path:
    """Return the interpreter of the environment in a folder."""
    return folder / "bin" / "python"


def made(folder: Path, key: str) -> Environment | None:
    """Return the environment in a folder if it was made from the requirements with this key."""
    try:
        found = Environment(**json.loads((folder / STAMP).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.key == key and interpreter(folder).exists() else None


def make(folder: Path, package: str, installs: Sequence[Sequence[str]]) -> Environment:
    """Make an environment, unless it is there.

    Args:
        package: whose version it is asked for. installs: requirements; each is one call of pip.

    Raises:
        InstallError: pip failed or took too long.
    """
    key = key_of(installs)
    if (found := made(folder, key)) is not None:
        return found
    if folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    _call([sys.executable, "-m", "venv", str(folder)], folder)
    python = str(interpreter(folder))
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    for some in installs:
        _call([*pip, "install", "--quiet", *some], folder)
    seconds = time.perf_counter() - begin
    frozen = _call([*pip, "freeze"], folder).lower().split()
    versions = dict(line.split("==") for line in frozen if "==" in line)
    found = Environment(key, round(seconds, 1), len(versions), versions[package])
    (folder / STAMP).write_text(json.dumps(asdict(found)) + "\n")
    return found


def _call(command: Sequence[str], folder: Path) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=_variables(os.environ)
        )
    except subprocess.TimeoutExpired:
        raise InstallError(f"{folder.name}: {command[-1]}: pip took more than {LIMIT_S} s") from None
    if done.returncode:
        raise InstallError(f"{folder.name} could not be installed:\n{done.stderr[-TAIL:]}")
    return done.stdout


def _variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of an install: DeepSpeed compiles nothing, and no package of ours is seen."""
    kept = {key: value for key, value in environ.items() if key not in {"PYTHONPATH", "PYTHONHOME"}}
    return {**kept, "DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
