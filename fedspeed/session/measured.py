"""What planner and engine need to know of each other's measures: a probe's file, and the sizes of a base."""

from collections.abc import Mapping
from pathlib import Path

from fedspeed.engine.base.choose import BaseSizes
from fedspeed.errors import PlanError
from fedspeed.files import json_value
from fedspeed.models.families.shape import ModelShape
from fedspeed.planner.memory import sizes
from fedspeed.planner.probe_file import checked_probe


def base_sizes(shape: ModelShape, type_bytes: int, holders: int = 0) -> BaseSizes:
    """What `engine.base_gib` is held against, known before there is a model. holders: as in BaseSizes."""
    unit = sizes(shape, type_bytes)
    return BaseSizes(
        unit.block,
        shape.layers,
        unit.embedding_and_head,
        end=max(unit.embedding, unit.head),
        beside=unit.other,
        holders=holders,
    )


def read_probe_file(path: Path) -> Mapping:
    """What `fedspeed probe` wrote.

    Raises:
        PlanError: it cannot be read, or is something else.
    """
    try:
        return checked_probe(json_value(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError) as error:
        raise PlanError(
            f"{path}: cannot be read as a probe's file ({error}); write it with `fedspeed probe --out FILE`"
        ) from error
