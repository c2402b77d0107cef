"""Data files of a test."""

import gzip
from pathlib import Path


def write(folder: Path, name: str, content: str | bytes) -> Path:
    """Write a data file, compressed if its name says so."""
    path = folder / name
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path
