"""Packages that must be installed, checked before anything is started."""

import importlib.util
import sys

from fedspeed.errors import MissingPackage

# Needed to train.
NEEDED = ("numpy", "torch", "deepspeed", "transformers", "peft", "safetensors")


def missing_package(error: ModuleNotFoundError) -> MissingPackage:
    """Return the error that reports a missing package to the user.

    Raises:
        ModuleNotFoundError: a module of our own is missing, which is a bug.
    """
    name = (error.name or "").partition(".")[0]
    if name in ("", "fedspeed"):
        raise error
    return MissingPackage([name], sys.executable)


def need_packages() -> None:
    """Check that all packages for training are installed.

    Raises:
        MissingPackage: some are not.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise MissingPackage(missing, sys.executable)
