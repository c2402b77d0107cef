"""Which fields of a data file hold instruction, input, answer and category, by their names and contents."""

from dataclasses import dataclass
from pathlib import Path

from fedspeed.data.rows import Fields, records
from fedspeed.errors import DataError

LOOKED_AT = 1000  # rows
NAMES = {  # what each part of a row is called, the likelier first
    "instruction": ("instruction", "question", "prompt", "query", "problem", "task_description", "user"),
    "output": ("output", "response", "answer", "completion", "target", "solution", "assistant", "chosen"),
    "input": ("input", "context", "passage"),
    "category": ("category", "topic", "domain", "type", "label", "source", "subject", "language", "task"),
}
MAX_KINDS = 200  # a field with more different values is no category


@dataclass(frozen=True)
class Detected:
    """What was found in the first rows of a data file.

    Args:
        fields: names of fields, empty for a part that there is not.
        rows: how many were looked at. kinds: different values of the category.
    """

    fields: Fields
    rows: int
    kinds: int


def detect(path: Path) -> Detected:
    """Look at the first rows of a file.

    Raises:
        DataError: it cannot be read, holds no rows, or no field looks like an instruction or an answer.
    """
    rows = []
    for where, record in records(path):
        if not isinstance(record, dict):
            raise DataError(
                f"{where}: a record must be a JSON object with the fields of a row; see data.task=file in "
                "docs/config.md"
            )
        rows.append(record)
        if len(rows) == LOOKED_AT:
            break
    if not rows:
        raise DataError(f"{path}: the file holds no rows; name one with a record a line")
    texts = [name for name in rows[0] if all(isinstance(row.get(name), str) for row in rows)]
    found = {
        part: next((name for wanted in NAMES[part] for name in texts if name.lower() == wanted), "")
        for part in ("instruction", "output")
    }
    for part, name in found.items():
        if not name:
            advice = (
                " (conversations under 'messages' must be made into pairs first)"
                if "messages" in rows[0]
                else ""
            )
            raise DataError(
                f"{path}: no field is called as an {part} usually is ({', '.join(NAMES[part])}); its text "
                "fields are "
                f"{', '.join(texts) or 'none'}{advice}. Name the right one in data.{part}_field of a YAML "
                "of your own"
            )
    taken = set(found.values())
    optional = [
        name
        for name in _all_names(rows)
        if name not in taken and all(row.get(name) is None or isinstance(row[name], str) for row in rows)
    ]
    given = next((name for wanted in NAMES["input"] for name in optional if name.lower() == wanted), "")
    category, kinds = _category(rows, taken | {given})
    return Detected(Fields(found["instruction"], given, found["output"], category), len(rows), kinds)


def _category(rows: list[dict], taken: set[str]) -> tuple[str, int]:
    """(name of the field that tells kinds of rows apart, how many kinds), ("", 0) if there is none."""
    for wanted in NAMES["category"]:
        for name in rows[0]:
            values = {row.get(name) for row in rows if isinstance(row.get(name), (str, int))}
            if (
                name not in taken
                and name.lower() == wanted
                and 1 < len(values) <= min(MAX_KINDS, len(rows) // 2)
            ):
                return name, len(values)
    return "", 0


def _all_names(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))
