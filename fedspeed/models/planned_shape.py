"""The dimensions of a model to plan for, which need not be on this machine."""

from dataclasses import replace
from pathlib import Path

from fedspeed.errors import ModelError
from fedspeed.hub_names import is_hub_name
from fedspeed.models.base_files import base_shape
from fedspeed.models.catalogue import KNOWN, shape_of
from fedspeed.models.families.shape import ModelShape
from fedspeed.models.hub import hub_config
from fedspeed.models.local_config import config_file, shipped_names


def planned_shape(base: str) -> ModelShape:
    """Return the dimensions of a folder, a config.json, a known model, or any model on the hub. Of a model
    on the hub only config.json is downloaded.

    Raises:
        ModelError: there is no such model (the message lists the known ones), or FedSpeed cannot train it.
    """
    if base.lower() in {name.lower() for name in KNOWN}:
        return shape_of(base)
    path = config_file(base)
    if path is None and is_hub_name(base):
        try:
            path = hub_config(base)
        except ModelError as error:
            raise ModelError(f"{error}. Known without a network are {_known()}") from error
    if path is None:
        return shape_of(base)
    shape = shape_of(str(path))
    if not Path(base).exists():  # the name that the user gave, not a path in the cache
        shape = replace(shape, name=base)
    try:
        return replace(shape, tied=base_shape(path.parent).tied)
    except ModelError:  # no weights, or none that can be read: only config.json says whether the head is tied
        return shape


def _known() -> str:
    return ", ".join([*KNOWN, *(name for name in shipped_names() if name not in KNOWN)])
