"""Detection of the format of data files, and of the fields that contain instruction, input, answer and
category, by their names and values.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedspeed.data.files import records
from fedspeed.data.formats import FORMATS, Fields, to_record
from fedspeed.data.record import Record
from fedspeed.data.sources import Wanted, files_of
from fedspeed.errors import DataError

MAX_ROWS_READ = 1000
NAMES = {  # usual names of each field of a row, the more likely first
    "instruction": ("instruction", "question", "prompt", "query", "problem", "task_description", "user"),
    "output": ("output", "response", "answer", "completion", "target", "solution", "assistant", "chosen"),
    "input": ("input", "context", "passage"),
    "category": ("category", "topic", "domain", "type", "label", "source", "subject", "language", "task"),
}
MAX_CATEGORIES = 200  # a field with more different values is no category
_FIRST_FORMATS = ("messages", "sharegpt", "prompt_completion")  # before instruction; then text
_CONTENT = ("messages", "conversations", "prompt", "completion", "text")  # fields of formats with fixed names


@dataclass(frozen=True)
class Detected:
    """The result of a detection.

    Attributes:
        format: a name in FORMATS.
        fields: the names of the fields, empty for those that the file does not have. Formats other than
            `instruction` have a category only.
        files: number of files. rows: number of rows that were read. categories: number of different
            categories in them.
    """

    format: str
    fields: Fields
    files: int
    rows: int
    categories: int


def detect(value: str) -> Detected:
    """Detect the format and the fields of data files from their first rows.

    Args:
        value: a file, a pattern or a folder.

    Raises:
        DataError: a file is missing, cannot be read or has no rows; no format has such fields, and none has a
            usual name of an instruction or an answer; or a row that was read is not of the format.
    """
    files = files_of(value, Wanted("--data", "file"))
    rows: list[Record] = []
    for where, record in _first(files):
        rows.append(to_record(record, where))
        if len(rows) == MAX_ROWS_READ:
            break
    if not rows:
        raise DataError(f"{value}: the file holds no rows; name one with a record a line")
    name, fields = _format(value, rows)
    category, categories = _category(rows, {*_CONTENT, fields.instruction, fields.input, fields.output})
    fields = replace(fields, category=category)
    for row in rows:
        FORMATS[name].row(row, fields)
    return Detected(name, fields, files=len(files), rows=len(rows), categories=categories)


def _format(value: str, rows: list[Record]) -> tuple[str, Fields]:
    """Return (name of the format, its fields without a category)."""
    first = rows[0]
    nothing = Fields("", "", "", "")
    for name in _FIRST_FORMATS:
        if FORMATS[name].recognises(first, nothing):
            return name, nothing
    text_fields = [
        name for name in first.values if all(isinstance(row.values.get(name), str) for row in rows)
    ]
    instruction, output = (_named_as(part, text_fields) for part in ("instruction", "output"))
    if instruction and output:
        return "instruction", Fields(instruction, _input(rows, {instruction, output}), output, "")
    if FORMATS["text"].recognises(first, nothing):
        return "text", nothing
    part = "output" if instruction else "instruction"
    raise DataError(
        f"{value}: no field is called as an {part} usually is ({', '.join(NAMES[part])}); its text fields "
        f"are {', '.join(text_fields) or 'none'}. Name the right one in data.{part}_field of a YAML of "
        "your own; docs/data.md shows the formats of records"
    )


def _input(rows: list[Record], used: set[str]) -> str:
    """Return the name of an optional text field that is called as an input usually is; empty if none is."""
    names = dict.fromkeys(name for row in rows for name in row.values)
    texts = (
        name
        for name in names
        if name not in used and all(not row.has(name) or isinstance(row.values[name], str) for row in rows)
    )
    return _named_as("input", list(texts))


def _first(files: Iterable[Path]) -> Iterator[tuple[str, object]]:
    for file in files:
        yield from records(file)


def _named_as(part: str, names: Sequence[str]) -> str:
    """Return the first of the names that is usual for a field of a row; empty if none is."""
    return next((name for usual in NAMES[part] for name in names if name.lower() == usual), "")


def _category(rows: list[Record], used: set[str]) -> tuple[str, int]:
    """Return (name of the category's field, number of categories); ("", 0) if there is none.

    Args:
        used: names of fields that have another meaning.
    """
    for usual in NAMES["category"]:
        for name in rows[0].values:
            values = {row.values[name] for row in rows if isinstance(row.values.get(name), (str, int))}
            is_category = 1 < len(values) <= min(MAX_CATEGORIES, len(rows) // 2)
            if name not in used and name.lower() == usual and is_category:
                return name, len(values)
    return "", 0
