"""Packages that are not there, before anything is started."""

import importlib.util
import sys

from fedspeed.errors import MissingPackage

NEEDED = (
    "numpy",
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "safetensors",
)  # to train; looked for before anything is started


def missing_package(error: ModuleNotFoundError) -> MissingPackage:
    """A package that is not there, in a user's words; one of ours that is not there is our own fault."""
    name = (error.name or "").partition(".")[0]
    if name in ("", "fedspeed"):
        raise error
    return MissingPackage([name], sys.executable)


def need_packages() -> None:
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise MissingPackage(missing, sys.executable)
