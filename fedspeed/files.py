"""Writing a file so that a reader, or a crash, finds either the old one or the new one; whether a place can
be written to at all; and JSON that a user wrote.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`. The content is on disk before the name points to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(waiting, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(waiting, path)
        folder = os.open(
            path.parent, os.O_RDONLY
        )  # the rename itself survives a power cut only once the folder is on disk
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        waiting.unlink(missing_ok=True)


def follow_umask(folder: Path) -> None:
    """Give the files in a folder the mode that any new file gets there: libraries that write by way of
    temporary files leave them readable for their owner alone.
    """
    sample = folder / f".mode.{os.getpid()}"
    sample.touch(exist_ok=False)
    mode = sample.stat().st_mode & 0o777
    sample.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def check_writable(folder: Path) -> None:
    """Raises OSError where `folder`, or the first folder above it that is there, takes no new file; leaves
    nothing behind.

    Tried, because permissions do not tell: root has all of them, and /proc or a read-only disk still take
        nothing.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    with tempfile.TemporaryFile(dir=existing):
        pass


def json_value(text: str | bytes, object_pairs_hook: Callable | None = None) -> object:
    """What a JSON text holds; whatever is wrong with the text is a ValueError.

    Raises:
        ValueError: the text is not JSON (then a json.JSONDecodeError, which knows line and column), it is
            nested too deeply, or a whole number in it has more digits than Python converts (4300).
    """
    try:
        return json.loads(text, parse_int=_whole_number, object_pairs_hook=object_pairs_hook)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _whole_number(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:
        raise ValueError(
            f"a whole number of {len(digits)} digits, {digits[:12]}..., is too long to be read"
        ) from None
