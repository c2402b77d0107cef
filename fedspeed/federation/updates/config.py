"""The transforms of an update that a run may list in `federation.updates`, and what each may be told.

A transform is a folder with `update.py` and a leaf `config.py`. It is added by a line in `UPDATES`.
"""

from importlib import import_module

UPDATES = {"clip": "fedspeed.federation.updates.clip"}  # name -> path of its folder


def variant_of(name: str) -> type:
    """Return the dataclass of the transform `name`, one variant of the union that `federation.updates` lists.
    No transform is imported.
    """
    return import_module(f"{UPDATES[name]}.config").Config
