"""Recorded values of golden runs: as a file that people read, and held against what runs give."""

import json
import math
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

# Relative difference of losses that a machine may make which rounds otherwise, by type of the arithmetic.
NEAR = {"fp32": 1e-4, "fp16": 1e-3, "bf16": 5e-3}
LOSSES = ("loss", "steps")  # parts of the names of values that are losses
ROUGHLY = 100  # so many times as much other numbers may differ, such as norms and estimated errors
PACKAGES = ("torch", "numpy", "transformers", "peft", "deepspeed")


def versions() -> str:
    """Return what the digits may depend on besides the processor: versions of Python and of libraries."""
    packages = [f"{name} {version(name)}" for name in PACKAGES]
    return ", ".join([f"Python {platform.python_version()}", *packages])


@dataclass(frozen=True)
class Recorded:
    """What a file of golden values holds: the probe of its machine, versions, values by run."""

    probe: dict[str, str]
    made_with: str
    runs: dict[str, dict]

    @classmethod
    def read(cls, path: Path) -> "Recorded":
        """Read such a file. ValueError names the file where it is none."""
        try:
            values = json.loads(path.read_text())
            return cls(values["probe"], values["made_with"], values["runs"])
        except (KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path}: not a file of golden values ({error}); take it from version control, "
                "or record it anew"
            ) from error

    def write(self, path: Path) -> None:
        """Write the file, one line for each round, rank and tensor."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_text({"probe": self.probe, "made_with": self.made_with, "runs": self.runs}) + "\n")


def _text(value, depth: int = 0) -> str:
    """Return JSON in which each round, rank and tensor has a line of its own."""
    if isinstance(value, dict) and depth < 4 and value:
        ends = "{}"
        parts = [f"{json.dumps(name)}: {_text(one, depth + 1)}" for name, one in value.items()]
    elif isinstance(value, list) and depth < 4 and any(isinstance(one, dict) for one in value):
        ends = "[]"
        parts = [_text(one, depth + 1) for one in value]
    else:
        return json.dumps(value)
    pad = "\n" + " " * (depth + 1)
    return ends[0] + pad + f",{pad}".join(parts) + pad[:-1] + ends[1]


def differences(expected, found, near: float = 0.0, place: str = "") -> list[str]:
    """Return where `found` differs from `expected`, as JSON holds them, each as `place: expected, found`.

    Args:
        near: 0: every digit counts. Else losses may differ by so much of themselves, other numbers that are
            no counts by ROUGHLY times as much, digests at will.
        place: names of what surrounds the two.
    """
    if isinstance(expected, dict) and isinstance(found, dict):
        told = []
        for name in dict.fromkeys([*expected, *found]):
            if name in expected and name in found:
                told += differences(expected[name], found[name], near, _at(place, name))
            else:
                here = _at(place, name)
                told.append(f"{here}: expected {_short(expected, name)}, found {_short(found, name)}")
        return told
    if isinstance(expected, list) and isinstance(found, list):
        told = []
        if len(expected) != len(found):
            told.append(f"{place}: expected {len(expected)} entries, found {len(found)}")
        for number, (old, new) in enumerate(zip(expected, found)):
            told += differences(old, new, near, f"{place}[{number}]")
        return told
    if _is_same(expected, found) or near and _is_near(expected, found, near, place):
        return []
    return [f"{place}: expected {json.dumps(expected)}, found {json.dumps(found)}"]


def _at(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _short(values: dict, name: str) -> str:
    return json.dumps(values[name])[:80] if name in values else "nothing"


def _is_same(expected, found) -> bool:
    return type(expected) is type(found) and expected == found


def _is_near(expected, found, near: float, place: str) -> bool:
    if place.startswith("adapter."):
        return True
    if not (isinstance(expected, float) and isinstance(found, float)):
        return False
    is_loss = any(word in place for word in LOSSES)
    return math.isclose(expected, found, rel_tol=near if is_loss else ROUGHLY * near)
