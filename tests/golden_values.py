"""Recorded values of golden runs: reading and writing their file, and comparing them with new values."""

import json
import math
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

# Relative tolerance of losses on a machine that rounds differently, by type of the arithmetic.
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-3, "bf16": 5e-3}
LOSSES = ("loss", "steps")  # a value is a loss if its name contains one of these
OTHER_NUMBERS = 100  # factor of the tolerance for other numbers, such as norms and estimated errors
PACKAGES = ("torch", "numpy", "transformers", "peft", "deepspeed")


def versions() -> str:
    """Return the versions of Python and of libraries, on which the digits may depend."""
    packages = [f"{name} {version(name)}" for name in PACKAGES]
    return ", ".join([f"Python {platform.python_version()}", *packages])


@dataclass(frozen=True)
class Recorded:
    """Contents of a file of golden values: the probe of the machine, versions, and values by run."""

    probe: dict[str, str]
    made_with: str
    runs: dict[str, dict]

    @classmethod
    def read(cls, path: Path) -> "Recorded":
        """Read a file of golden values.

        Raises:
            ValueError: the file has another format; the message names it.
        """
        try:
            values = json.loads(path.read_text())
            return cls(values["probe"], values["made_with"], values["runs"])
        except (KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path}: not a file of golden values ({error}); take it from version control, "
                "or record it anew"
            ) from error

    def write(self, path: Path) -> None:
        """Write the file with one line for each round, rank and tensor."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_text({"probe": self.probe, "made_with": self.made_with, "runs": self.runs}) + "\n")


def _text(value, depth: int = 0) -> str:
    """Return JSON with a line for each round, rank and tensor."""
    if isinstance(value, dict) and depth < 4 and value:
        brackets = "{}"
        items = [f"{json.dumps(name)}: {_text(one, depth + 1)}" for name, one in value.items()]
    elif isinstance(value, list) and depth < 4 and any(isinstance(one, dict) for one in value):
        brackets = "[]"
        items = [_text(one, depth + 1) for one in value]
    else:
        return json.dumps(value)
    pad = "\n" + " " * (depth + 1)
    return brackets[0] + pad + f",{pad}".join(items) + pad[:-1] + brackets[1]


def differences(expected, values, tolerance: float = 0.0, path: str = "") -> list[str]:
    """Return where JSON values differ from the expected ones, each as `path: expected ..., found ...`.

    Args:
        tolerance: 0: every digit counts. Otherwise the relative tolerance of losses; other numbers that are
            no counts get OTHER_NUMBERS times as much, and digests are not compared.
        path: where both are in the whole, as `rounds[0].train_loss`.
    """
    if isinstance(expected, dict) and isinstance(values, dict):
        faults = []
        for name in dict.fromkeys([*expected, *values]):
            inner = f"{path}.{name}" if path else name
            if name in expected and name in values:
                faults += differences(expected[name], values[name], tolerance, inner)
            else:
                faults.append(f"{inner}: expected {_short(expected, name)}, found {_short(values, name)}")
        return faults
    if isinstance(expected, list) and isinstance(values, list):
        faults = []
        if len(expected) != len(values):
            faults.append(f"{path}: expected {len(expected)} entries, found {len(values)}")
        for number, (old, new) in enumerate(zip(expected, values)):
            faults += differences(old, new, tolerance, f"{path}[{number}]")
        return faults
    if _is_same(expected, values) or tolerance and _is_near(expected, values, tolerance, path):
        return []
    return [f"{path}: expected {json.dumps(expected)}, found {json.dumps(values)}"]


def _short(values: dict, name: str) -> str:
    """Return the beginning of a value as JSON, or `nothing`."""
    return json.dumps(values[name])[:80] if name in values else "nothing"


def _is_same(expected, value) -> bool:
    """Say whether two values have the same type and are equal."""
    return type(expected) is type(value) and expected == value


def _is_near(expected, value, tolerance: float, path: str) -> bool:
    """Say whether a value is a digest, or a number within its tolerance."""
    if path.startswith("adapter."):
        return True
    if not (isinstance(expected, float) and isinstance(value, float)):
        return False
    is_loss = any(name in path for name in LOSSES)
    return math.isclose(expected, value, rel_tol=tolerance if is_loss else OTHER_NUMBERS * tolerance)
