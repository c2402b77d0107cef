"""Rows of text, and their readers from files and hub data sets.

A reader never guesses: every fault of a file is a `DataError` that names file, line, value and remedy.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedspeed.errors import DataError
from fedspeed.files import json_value

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: system, user, assistant or tool.
        trained: whether an assistant message carries loss; without meaning for other roles.
    """

    role: str
    content: str
    trained: bool = True


@dataclass(frozen=True)
class Row:
    """One row of text. `input` and `category` are empty where the source has none.

    Attributes:
        messages: a conversation of several turns, which ends with a trained assistant message. If there is
            one, instruction and input are empty and `output` is that last message. A conversation of one
            question and one answer has no messages: it is an instruction and an output.
        is_text: whether `output` is a whole text without prompt, which no template is applied to.
        is_completion: whether `instruction` is the text before `output` as it stands, which
            data.template=auto applies no template to.
    """

    instruction: str
    input: str
    output: str
    category: str
    messages: tuple[Message, ...] = ()
    is_text: bool = False
    is_completion: bool = False


@dataclass(frozen=True)
class Fields:
    """The names of a record's fields that become the fields of a row; empty where the source has no such
    field.
    """

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    category: str = "category"


def read_rows(path: Path, fields: Fields) -> list[tuple[str, Row]]:
    """Read all rows of a .json list or a .jsonl file, gzipped or not.

    Returns:
        Pairs (where, row) in file order; `where` is "file:line" for messages (of a .json list: "file, item
        n").

    Raises:
        DataError: the file is unreadable, malformed or empty, or a record lacks a field.
    """
    rows = [(where, to_row(record, fields, where)) for where, record in records(path)]
    if not rows:
        raise DataError(
            f"{path}: the file holds no rows; name a file with at least one record per client in data.path"
        )
    return rows


def hub_rows(name: str, fields: Fields) -> list[tuple[str, Row]]:
    """Read all rows of the `train` split of a hub data set.

    Args:
        name: "owner/name", or "owner/name:configuration" where the set has several.

    Raises:
        DataError: the library `datasets` is missing, it cannot load the set (offline, no such set), or a
        record
            lacks a field.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"data.path={name}: there is no such file or folder, and reading it as a hub data set needs the "
            "library: pip install datasets (or give a local .json, .jsonl or .jsonl.gz file)"
        ) from None
    set_name, _, configuration = name.partition(":")
    try:
        records = datasets.load_dataset(set_name, configuration or None, split="train")
    except (
        Exception
    ) as error:  # of many types: OSError, ValueError, the library's, and those of its network stack
        raise DataError(
            f"data.path={name}: there is no such file or folder, and the hub data set cannot be loaded "
            f"({type(error).__name__}: {error}). Without network, give a local .json, .jsonl or .jsonl.gz "
            "file"
        ) from error
    rows = []
    for index, record in enumerate(records):
        where = f"{name}, item {index}"
        rows.append((where, to_row(record, fields, where)))
    if not rows:
        raise DataError(
            f"{name}: the train split of the hub data set holds no rows; choose another set in data.path"
        )
    return rows


def to_row(record: object, fields: Fields, where: str) -> Row:
    """Return the row of one record. Instruction and output must be text; input and category may be absent or
    null.

    Args:
        where: names the record in messages.

    Raises:
        DataError: a field is missing or of the wrong type, or the row has no text at all.
    """
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: a record must be a JSON object with the fields of a row, this is {_short(record)}"
        )
    row = Row(
        instruction=_text(record, fields.instruction, "instruction", where),
        input=_optional_text(record, fields.input, "input", where),
        output=_text(record, fields.output, "output", where),
        category=_category(record, fields.category, where),
    )
    if not (row.instruction + row.input + row.output).strip():
        raise DataError(
            f"{where}: the row is empty, without any text in instruction, input and output; fill it in or "
            "remove it"
        )
    return row


def _text(record: dict, name: str, part: str, where: str) -> str:
    if name not in record:
        raise DataError(
            f"{where}: no field {name!r} for the {part} (the record has: "
            f"{', '.join(map(str, record)) or 'nothing'}); name the right one with task=file and "
            f"data.{part}_field, or choose the file that belongs to the task"
        )
    value = record[name]
    if not isinstance(value, str):
        raise DataError(
            f"{where}: field {name!r} must be text, this is {_short(value)}; correct the record or remove it"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # an escaped surrogate, which JSON allows and no tokenizer accepts
        raise DataError(
            f"{where}: field {name!r} holds {ascii(value[error.start])} at character {error.start}, half of "
            "a character; correct the record or remove it"
        ) from None
    return value


def _optional_text(record: dict, name: str, part: str, where: str) -> str:
    return "" if record.get(name) is None else _text(record, name, part, where)


def _category(record: dict, name: str, where: str) -> str:
    value = record.get(name)
    if isinstance(value, (list, dict)):
        raise DataError(
            f"{where}: field {name!r} must be a plain category, this is {_short(value)}; "
            "name another field in data.category_field"
        )
    return "" if value is None or not str(value).strip() else str(value)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def records(path: Path) -> Iterator[tuple[str, object]]:
    """Yield (where, JSON value) for every record of a file, without checking its fields.

    Raises:
        DataError: the file cannot be read, or is not JSON.
    """
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown kind of file; data files end in {', '.join(SUFFIXES)}")
    lines = _lines(path)
    return _json_list(path, lines) if name.removesuffix(".gz").endswith(".json") else _json_lines(path, lines)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, decoded line). Lines end at newlines only, since JSON text may contain other line
    separators such as U+2028.
    """
    number = 0
    try:
        with (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number}: not UTF-8 (byte {error.object[error.start]:#04x} at position {error.start} "
            "of the line); save the file as UTF-8"
        ) from None
    except EOFError:
        raise DataError(
            f"{path}: the gzip stream ends after line {number}, the file is truncated; copy or download it "
            "again"
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: damaged gzip file after line {number} ({error}); copy or download it again"
        ) from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); check data.path and the permissions"
        ) from None


def _json_lines(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[str, object]]:
    for number, line in lines:
        if line.strip():
            try:
                yield f"{path}:{number}", json_value(line)
            except ValueError as error:
                raise DataError(
                    f"{path}:{number}: not JSON ({error}): {_short(line.strip())}; a .jsonl file holds one "
                    "JSON object a line (name it .json if it is one JSON list)"
                ) from None


def _json_list(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[str, object]]:
    text = "".join(line for _, line in lines)
    if not text.strip():
        return
    try:
        items = json_value(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: not JSON ({error.msg}, column {error.colno}); a .json file holds one "
            "JSON list of objects (name it .jsonl if it holds one object a line)"
        ) from None
    except ValueError as error:
        raise DataError(
            f"{path}: cannot be read as a list of rows ({error}); correct the file, or choose another one "
            "in data.path"
        ) from None
    if not isinstance(items, list):
        raise DataError(
            f"{path}: a .json file must hold one JSON list of objects, this is {_short(items)}; put the "
            "rows in a list"
        )
    for index, item in enumerate(items):
        yield f"{path}, item {index}", item
