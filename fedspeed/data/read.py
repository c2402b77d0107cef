"""Reading of rows: from a file or a hub data set, with the format of the records."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fedspeed.data.files import records
from fedspeed.data.formats import FORMATS, Fields, format_name, to_record
from fedspeed.data.hub import hub_records
from fedspeed.data.rows import Row
from fedspeed.errors import DataError


@dataclass(frozen=True)
class Layout:
    """How the records of a source are written.

    Attributes:
        fields: the names of their fields.
        format: a name in FORMATS, or auto: by the first record of each file.
    """

    fields: Fields = field(default_factory=Fields)
    format: str = "instruction"


def read_rows(path: Path, layout: Layout, key: str = "data.path") -> list[tuple[str, Row]]:
    """Read all rows of a file (`data.files`).

    Args:
        key: the key that names the file, for messages.

    Returns:
        Pairs (where, row) in file order; `where` names the record in messages.

    Raises:
        DataError: the file is unreadable, malformed or empty, or a record lacks a field.
    """
    rows = _rows(records(path), layout)
    if not rows:
        raise DataError(f"{path}: the file holds no rows; name a file with at least one record in {key}")
    return rows


def hub_rows(name: str, layout: Layout) -> list[tuple[str, Row]]:
    """Read all rows of the `train` split of a hub data set.

    Args:
        name: "owner/name", or "owner/name:configuration" where the set has several.

    Raises:
        DataError: see `hub.hub_records`; or a record lacks a field, or there is none.
    """
    rows = _rows(hub_records(name), layout)
    if not rows:
        raise DataError(
            f"{name}: the train split of the hub data set holds no rows; choose another set in data.path"
        )
    return rows


def _rows(values: Iterable[tuple[str, object]], layout: Layout) -> list[tuple[str, Row]]:
    rows = []
    name = layout.format
    for where, value in values:
        record = to_record(value, where)
        if name == "auto":
            name = format_name(record, layout.fields)
        rows.append((where, FORMATS[name].row(record, layout.fields)))
    return rows
