"""Digests of a model's files, to tell whether two folders, or one folder at two times, hold the same."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedspeed.files import json_value

WHOLE_BYTES = 16 << 20  # files up to this size count with all of their content
SAMPLES = 64  # larger ones with their size and so many samples, the first of the header of a safetensors file
SAMPLE_BYTES = 64 << 10
# Keys that say by which version a config.json was written and where it came from, not what the model is.
WITHOUT_MEANING = ("transformers_version", "_name_or_path")


def config_digest(path: Path) -> str:
    """Return a digest of what a config.json says of its model; empty if it cannot be read."""
    try:
        values = json_value(path.read_bytes())
    except (OSError, ValueError):
        return ""
    if isinstance(values, dict):
        values = {key: value for key, value in values.items() if key not in WITHOUT_MEANING}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def weights_digest(folder: Path) -> str:
    """Return a digest of the safetensors of a base's folder; empty if it has none."""
    return files_digest(sorted(folder.glob("*.safetensors")))


def files_digest(paths: Sequence[Path]) -> str:
    """Return a digest of the names and contents of those files that exist; empty if none does, or one
    cannot be read.
    """
    existing = [path for path in paths if path.is_file()]
    state = hashlib.sha256()
    try:
        for path in existing:
            for piece in _pieces(path):
                state.update(piece)
    except OSError:
        return ""
    return state.hexdigest() if existing else ""


def _pieces(path: Path) -> Iterator[bytes]:
    """Yield name, size, and all of the content; of a large file, samples from its beginning to its end."""
    size = path.stat().st_size
    yield json.dumps([path.name, size]).encode()
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            yield file.read()
            return
        for sample in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
            yield file.read(SAMPLE_BYTES)
