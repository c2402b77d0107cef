"""What a model's files hold, as digests: whether two places, or one place at two moments, hold the same."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedspeed.files import json_value

WHOLE_BYTES = 16 << 20  # files up to this size count with all of their content
SAMPLES = 64  # larger ones with their size and so many samples, the first of the header of a safetensors file
SAMPLE_BYTES = 64 << 10
# Who has written a config.json, and where it was copied from, changes nothing about the model.
WITHOUT_MEANING = ("transformers_version", "_name_or_path")


def of_config(path: Path) -> str:
    """Digests what a config.json says of its model; empty if it cannot be read."""
    try:
        values = json_value(path.read_bytes())
    except (OSError, ValueError):
        return ""
    if isinstance(values, dict):
        values = {key: value for key, value in values.items() if key not in WITHOUT_MEANING}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def of_weights(folder: Path) -> str:
    """Digests the safetensors of a base's folder; empty if it has none."""
    return of_files(sorted(folder.glob("*.safetensors")))


def of_files(paths: Sequence[Path]) -> str:
    """Digests names and contents of those files that are there; empty if none is, or one cannot be read."""
    there = [path for path in paths if path.is_file()]
    state = hashlib.sha256()
    try:
        for path in there:
            for piece in _pieces(path):
                state.update(piece)
    except OSError:
        return ""
    return state.hexdigest() if there else ""


def _pieces(path: Path) -> Iterator[bytes]:
    """Name, size, and all of the content; of a large file, samples from its beginning to its end."""
    size = path.stat().st_size
    yield json.dumps([path.name, size]).encode()
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            yield file.read()
            return
        for sample in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
            yield file.read(SAMPLE_BYTES)
