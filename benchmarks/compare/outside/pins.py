"""What the clients of every system need to train the task, with the versions that FedSpeed is tested with."""

import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


@cache
def pinned(package: str) -> str:
    """Return FedSpeed's own requirement of a package, as in `torch==2.13.0`."""
    found = re.search(rf"^{package}==\S+$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert found is not None, package
    return found[0]


def of_clients() -> tuple[str, ...]:
    """Return the requirements of benchmarks.compare.outside.trainer and fedspeed.data."""
    return (*map(pinned, ("torch", "transformers", "peft", "pyyaml")), "numpy", "safetensors")
