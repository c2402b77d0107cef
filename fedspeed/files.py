"""Atomic writes, digests, a check that a folder can be written to, and parsing of JSON that others wrote."""

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

MAX_DEPTH = 32  # nested arrays and objects of a JSON text from another organisation
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, finds either the old content or the new one.

    The content is on disk before the name refers to it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        # The rename itself survives a power failure only once the folder is on disk.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        draft.unlink(missing_ok=True)


def follow_umask(folder: Path) -> None:
    """Give the files in a folder the mode that a new file gets there.

    Libraries that write through temporary files make them readable for their owner alone.
    """
    sample = folder / f".mode.{os.getpid()}"
    sample.touch(exist_ok=False)
    mode = sample.stat().st_mode & 0o777
    sample.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def check_writable(folder: Path) -> None:
    """Check that a folder, or its nearest existing ancestor, can be written to; leave nothing behind.

    A file is created, because permissions do not decide: root has all of them, and /proc or a read-only disk
    still accept no file.

    Raises:
        OSError: no file can be created.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    with tempfile.TemporaryFile(dir=existing):
        pass


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_number(number: float) -> float | None:
    """Return a number for JSON, which has none for infinity and NaN (the loss of a diverged model): None."""
    return number if math.isfinite(number) else None


def json_value(text: str | bytes, object_pairs_hook: Callable | None = None) -> object:
    """Parse a JSON text; whatever is wrong with the text is a ValueError.

    Raises:
        ValueError: the text is not JSON (then it is a json.JSONDecodeError, with line and column), it is
            nested too deeply, or a whole number has more digits than Python converts (4300).
    """
    try:
        return json.loads(text, parse_int=_whole_number, object_pairs_hook=object_pairs_hook)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def foreign_json(content: bytes, max_bytes: int) -> object:
    """Parse a JSON text that another organisation wrote: bounded in size and in depth before it is parsed.

    Raises:
        ValueError: it is larger than `max_bytes`, nested deeper than `MAX_DEPTH`, no UTF-8, or no JSON.
    """
    if len(content) > max_bytes:
        raise ValueError(f"{len(content)} bytes, of at most {max_bytes}")
    text = content.decode("utf-8")
    depth = 0
    for token in _BRACKETS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
    return json_value(text)


def _whole_number(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:
        raise ValueError(
            f"a whole number of {len(digits)} digits, {digits[:12]}..., is too long to be read"
        ) from None
