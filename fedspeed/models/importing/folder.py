"""Import of a model into a folder, which appears as a whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any

from fedspeed import activity
from fedspeed.errors import ModelError
from fedspeed.files import check_writable, follow_umask
from fedspeed.models.base_files import check_base
from fedspeed.models.importing.shards import write_tensors
from fedspeed.models.importing.source import Source
from fedspeed.models.numeric_types import TORCH_NAMES
from fedspeed.models.provenance import FILE, Provenance, provenance_of

PIECE_BYTES = 16 << 20  # read at a time
_OTHER_KEYS = ("torch_dtype", "dtype", "_name_or_path", "auto_map")
_SHORT_NAMES = {long: short for short, long in TORCH_NAMES.items()}


def is_imported(source: Source, out: Path) -> bool:
    """Return whether a folder already holds this import. Another folder, or one that cannot be written, is
    refused.

    Raises:
        ModelError: the folder holds something else, or none can be made there.
    """
    try:
        if not out.exists():
            check_writable(out.parent)
            return False
        if out.is_dir() and not any(out.iterdir()):
            return False
    except OSError as error:
        raise ModelError(f"--out={out}: cannot be written ({error.strerror}); name another folder") from error
    earlier = provenance_of(out) if out.is_dir() else None
    if earlier is None:
        raise ModelError(
            f"--out={out}: is there already and was not written by import-base; name a new folder"
        )
    if (earlier.fingerprint, earlier.dtype) != (source.provenance.fingerprint, source.provenance.dtype):
        raise ModelError(
            f"--out={out}: holds another import ({earlier.describe()}, --dtype {earlier.dtype}); name a new "
            "folder, or delete that one"
        )
    return True


def write_base(source: Source, out: Path, check: Callable[[Path], None]) -> tuple[Provenance, list[str]]:
    """Write a model as a base. Return its origin, and notes on its files.

    Args:
        out: must be absent or empty.
        check: called with the folder before it gets its name; raises if the base is not usable.

    Raises:
        ModelError: the source is damaged, or FedSpeed cannot use it.
    """
    with _draft_of(out) as draft:
        config = _write(source, draft)
        (draft / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        _, _, notes = check_base(draft)
        provenance = replace(source.provenance, files=_digests(source))
        (draft / FILE).write_text(provenance.text(), encoding="utf-8")
        follow_umask(draft)
        check(draft)
    return provenance, [note.replace(str(draft), str(out)) for note in notes]


def _write(source: Source, draft: Path) -> dict[str, Any]:
    """Write the tensors; return the values of config.json."""
    dtype = source.provenance.dtype
    config, tensors = source.open(draft, "bf16" if dtype == "auto" else dtype)
    named = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    dequantised = "bf16" if source.is_gguf else _SHORT_NAMES.get(named, "bf16")
    write_tensors(draft, tensors, dtype, dequantised)
    values = {key: value for key, value in config.items() if key not in _OTHER_KEYS}
    is_plain = source.quantisation is None and not source.is_gguf
    if dtype == "auto":
        kept = named if is_plain else TORCH_NAMES[dequantised]
    else:
        kept = TORCH_NAMES[dtype]
    return values | ({"dtype": kept} if kept else {})


@contextmanager
def _draft_of(out: Path) -> Iterator[Path]:
    """Give a folder next to `out` that gets its name at the end, and is removed if anything fails."""
    folder = out.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.import")
    draft.mkdir()
    try:
        yield draft
        if folder.is_dir():
            folder.rmdir()  # empty, as is_imported has seen
        draft.rename(folder)
    except OSError as error:
        raise ModelError(
            f"--out={out}: cannot be written ({error.strerror or error}); make room, or name another folder"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove the drafts of imports that were killed."""
    for path in folder.parent.glob(f".{escape(folder.name)}.*.import"):
        number = path.name.rpartition(".import")[0].rpartition(".")[2]
        if number.isdigit() and not Path(f"/proc/{number}").exists():
            shutil.rmtree(path, ignore_errors=True)


def _digests(source: Source) -> dict[str, str]:
    """Return the SHA-256 of each file with the source's weights."""
    sizes = {path: path.stat().st_size for path in source.paths}
    pieces = sum(-(-size // PIECE_BYTES) for size in sizes.values())
    digests = {}
    with activity.during("the digest of the source", pieces, "piece"):
        for path in sizes:
            state = hashlib.sha256()
            with path.open("rb") as file:
                while piece := file.read(PIECE_BYTES):
                    state.update(piece)
                    activity.advance()
            digests[path.name] = state.hexdigest()
    return digests
