"""Detection of the fields of a data file that contain instruction, input, answer and category, by their names
and values.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedspeed.data.rows import Fields, records
from fedspeed.errors import DataError

MAX_ROWS_READ = 1000
NAMES = {  # usual names of each field of a row, the more likely first
    "instruction": ("instruction", "question", "prompt", "query", "problem", "task_description", "user"),
    "output": ("output", "response", "answer", "completion", "target", "solution", "assistant", "chosen"),
    "input": ("input", "context", "passage"),
    "category": ("category", "topic", "domain", "type", "label", "source", "subject", "language", "task"),
}
MAX_CATEGORIES = 200  # a field with more different values is no category


@dataclass(frozen=True)
class Detected:
    """The result of a detection.

    Attributes:
        fields: the names of the fields, empty for those that the file does not have.
        rows: number of rows that were read. categories: number of different categories in them.
    """

    fields: Fields
    rows: int
    categories: int


def detect(path: Path) -> Detected:
    """Detect the fields of a file from its first rows.

    Raises:
        DataError: it cannot be read, has no rows, or no field has a usual name of an instruction or an
        answer.
    """
    rows = []
    for where, record in records(path):
        if not isinstance(record, dict):
            raise DataError(
                f"{where}: a record must be a JSON object with the fields of a row; see data.task=file in "
                "docs/config.md"
            )
        rows.append(record)
        if len(rows) == MAX_ROWS_READ:
            break
    if not rows:
        raise DataError(f"{path}: the file holds no rows; name one with a record a line")
    text_fields = [name for name in rows[0] if all(isinstance(row.get(name), str) for row in rows)]
    required = {part: _named_as(part, text_fields) for part in ("instruction", "output")}
    for part, name in required.items():
        if not name:
            advice = ""
            if "messages" in rows[0]:
                advice = " (conversations under 'messages' must be made into pairs first)"
            raise DataError(
                f"{path}: no field is called as an {part} usually is ({', '.join(NAMES[part])}); its text "
                f"fields are {', '.join(text_fields) or 'none'}{advice}. Name the right one in "
                f"data.{part}_field of a YAML of your own"
            )
    used = set(required.values())
    optional = [
        name
        for name in dict.fromkeys(name for row in rows for name in row)
        if name not in used and all(row.get(name) is None or isinstance(row[name], str) for row in rows)
    ]
    input_field = _named_as("input", optional)
    category, categories = _category(rows, used | {input_field})
    fields = Fields(required["instruction"], input_field, required["output"], category)
    return Detected(fields, len(rows), categories)


def _named_as(part: str, names: Iterable[str]) -> str:
    """Return the first of the names that is usual for a field of a row; empty if none is."""
    return next((name for usual in NAMES[part] for name in names if name.lower() == usual), "")


def _category(rows: list[dict], used: set[str]) -> tuple[str, int]:
    """Return (name of the category's field, number of categories); ("", 0) if there is none.

    Args:
        used: names of fields that have another meaning.
    """
    for usual in NAMES["category"]:
        for name in rows[0]:
            values = {row.get(name) for row in rows if isinstance(row.get(name), (str, int))}
            is_category = 1 < len(values) <= min(MAX_CATEGORIES, len(rows) // 2)
            if name not in used and name.lower() == usual and is_category:
                return name, len(values)
    return "", 0
