"""Results as JSON: written at once after each of them, with the day, the machine and the versions."""

import argparse
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedspeed.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = (".json", ".md", ".png")  # of a result: its values, page and plot
LIBRARIES = ("torch", "deepspeed", "transformers", "peft")


def machine() -> dict[str, Any]:
    """Return what results were measured on: processor, cores, memory, vector instructions, versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = dict(line.split(":", 1) for line in lines if ":" in line)
    flags = next((value.split() for key, value in cpu.items() if key.strip() == "flags"), [])
    model = next((value.strip() for key, value in cpu.items() if key.strip() == "model name"), "unknown")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "vectors": [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags],
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
    }


def save(path: Path, values: Mapping[str, Any]) -> None:
    """Write values with the day and the machine; a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), **values}
    write_atomically(path, json.dumps(whole, indent=1).encode() + b"\n")


def add_folders(parser: argparse.ArgumentParser, part: str) -> None:
    """Add the arguments that say where a part's results go."""
    parser.add_argument("--out", type=Path, default=Path("runs/bench") / part, help="folder of the results")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="copy the three files there too")


def keep(path: Path, folder: Path | None) -> None:
    """Copy a result's JSON, its page and its plot into a folder; None: nowhere."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in FILES:
        source = path.with_suffix(suffix)
        if source.is_file():
            shutil.copyfile(source, folder / source.name)


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
