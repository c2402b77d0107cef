"""Readers of data files: csv, tsv, json, jsonl and parquet, by the ending of the name.

A reader never guesses: every fault of a file is a `DataError` that names file, line, value and remedy. The
fields of a record are checked in `data.formats`.
"""

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from fedspeed.data.record import shown
from fedspeed.errors import DataError
from fedspeed.files import json_value

Records = Iterator[tuple[str, object]]


def records(path: Path) -> Records:
    """Yield (where, value) for every record of a file, without checking its fields.

    `where` is "file:line" for messages; of a .json list "file, item n", of a .parquet file "file, row n",
    both from 0.

    Raises:
        DataError: the file cannot be read, or is not of the kind that its name says.
    """
    name = path.name.lower()
    for suffix, reader in _READERS.items():
        if name.endswith(suffix):
            return reader(path)
    raise DataError(f"{path}: unknown kind of file; data files end in {', '.join(SUFFIXES)}")


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
            f"{path}: cannot be read ({error.strerror or error}); check the path and the permissions"
        ) from None


def _json_lines(path: Path) -> Records:
    for number, line in _lines(path):
        if line.strip():
            try:
                yield f"{path}:{number}", json_value(line)
            except ValueError as error:
                raise DataError(
                    f"{path}:{number}: not JSON ({error}): {shown(line.strip())}; a .jsonl file holds one "
                    "JSON object a line (name it .json if it is one JSON list)"
                ) from None


def _json_list(path: Path) -> Records:
    text = "".join(line for _, line in _lines(path))
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
            f"{path}: cannot be read as a list of rows ({error}); correct the file, or choose another one"
        ) from None
    if not isinstance(items, list):
        raise DataError(
            f"{path}: a .json file must hold one JSON list of objects, this is {shown(items)}; put the "
            "rows in a list"
        )
    for index, item in enumerate(items):
        yield f"{path}, item {index}", item


def _table(path: Path, delimiter: str) -> Records:
    """Yield the records of a table whose first line names the columns (RFC 4180, also with tabs)."""
    csv.field_size_limit(sys.maxsize)  # the default, 128 KiB, is less than some texts have
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    header: list[str] = []
    start = 1  # of a record, which may have several lines
    try:
        for values in reader:
            where = f"{path}:{start}"
            start = reader.line_num + 1
            if not values:
                continue
            if not header:
                header = values
                _check_header(where, header)
            elif len(values) == len(header):
                yield where, dict(zip(header, values))
            else:
                raise DataError(
                    f"{where}: {len(values)} fields, and the header has {len(header)}: "
                    f"{shown(values)}; put fields with commas, tabs, quotes or line breaks into double "
                    "quotes"
                )
    except csv.Error as error:
        raise DataError(
            f"{path}:{start}: not a table ({error}); put fields with commas, tabs, quotes or line breaks "
            "into double quotes, and double the quotes inside"
        ) from None


def _check_header(where: str, names: list[str]) -> None:
    """Check the names of a table's columns.

    Raises:
        DataError: two are the same, or all are in one field with another delimiter between them.
    """
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise DataError(f"{where}: two columns are called {twice!r}; rename one of them")
    if len(names) == 1 and (other := next((mark for mark in ";\t|" if mark in names[0]), None)):
        raise DataError(
            f"{where}: the header {shown(names[0])} is one column with {other!r} in its name; columns are "
            "separated by commas in a .csv file, and by tabs in a .tsv file"
        )


def _parquet(path: Path) -> Records:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            f"{path}: reading parquet needs a library: pip install pyarrow (or convert the file to .jsonl)"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            numbered = enumerate(row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, record in numbered:
                yield f"{path}, row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise DataError(
            f"{path}: cannot be read as parquet ({reason}); check the path and the permissions, or copy the "
            "file again"
        ) from None


_TEXT_READERS: dict[str, Callable[[Path], Records]] = {
    ".json": _json_list,
    ".jsonl": _json_lines,
    ".csv": partial(_table, delimiter=","),
    ".tsv": partial(_table, delimiter="\t"),
}
_READERS: dict[str, Callable[[Path], Records]] = {
    **_TEXT_READERS,
    **{f"{suffix}.gz": reader for suffix, reader in _TEXT_READERS.items()},
    ".parquet": _parquet,
}
SUFFIXES = tuple(_READERS)
