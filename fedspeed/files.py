"""Writing a file so that a reader, or a crash, finds either the old one or the new one; and whether a place can be written to at all."""

import os
import tempfile
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
        folder = os.open(path.parent, os.O_RDONLY)  # the rename itself survives a power cut only once the folder is on disk
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        waiting.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raises OSError where `folder`, or the first folder above it that is there, takes no new file; leaves nothing behind.

    Tried, because permissions do not tell: root has all of them, and /proc or a read-only disk still take nothing.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    with tempfile.TemporaryFile(dir=existing):
        pass
