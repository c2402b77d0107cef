"""Inputs of the planner that do not come from the configuration: a probe's file, and the sizes of a base."""

from collections.abc import Mapping
from pathlib import Path

from fedspeed.engine.base.placement import BaseSizes
from fedspeed.errors import PlanError
from fedspeed.files import json_value
from fedspeed.models.families.shape import ModelShape
from fedspeed.planner.memory import sizes
from fedspeed.planner.probe_file import checked_probe


def base_sizes(shape: ModelShape, type_bytes: int, holders: int = 0) -> BaseSizes:
    """Return the sizes that `engine.base_gib` is compared with, without building the model.

    Args:
        holders: as in BaseSizes.
    """
    unit = sizes(shape, type_bytes)
    return BaseSizes(
        unit.block,
        shape.layers,
        unit.embedding_and_head,
        shared_slot=max(unit.embedding, unit.head),
        resident=unit.other,
        holders=holders,
    )


def read_probe_file(path: Path) -> Mapping:
    """Read the file that `fedspeed probe` writes.

    Raises:
        PlanError: it cannot be read, or is not a probe's file.
    """
    try:
        return checked_probe(json_value(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError) as error:
        raise PlanError(
            f"{path}: cannot be read as a probe's file ({error}); write it with `fedspeed probe --out FILE`"
        ) from error
