"""The registry of transforms of updates (`federation.updates`), and the classes of their options.

A transform is a folder with `update.py` and a leaf `config.py`. A line in `UPDATES` registers it.
"""

from importlib import import_module

UPDATES = {"clip": "fedspeed.federation.updates.clip"}  # name -> path of its folder


def variant_of(name: str) -> type:
    """Return the dataclass of the options of the transform `name`, one member of the union
    `federation.updates`. No transform is imported.
    """
    options: type = import_module(f"{UPDATES[name]}.config").Config
    return options
