"""What a run has read, by its content. A resumed run must go on with the same base, tokenizer, adapter and
rows, not only with the same names of them."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fedspeed.checkpoint.journal import Entry, Journal
from fedspeed.config.run import RunConfig
from fedspeed.data.clients import ClientRows, client_rows
from fedspeed.data.tasks import reads_hub
from fedspeed.errors import DataError, JournalError
from fedspeed.files import json_value

WHOLE_BYTES = 16 << 20  # files up to this size count with all of their content
SAMPLES = 64  # larger ones with their size and so many samples, the first of the header of a safetensors file
SAMPLE_BYTES = 64 << 10
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt")
# Who has written a config.json, and where it was copied from, changes nothing about the model.
WITHOUT_MEANING = ("transformers_version", "_name_or_path")

BASE_CONFIG = "base config"
BASE_WEIGHTS = "base weights"
TOKENIZER = "tokenizer"
ADAPTER = "adapter"
ROWS = "rows"


def check_inputs(journal: Journal, entry: Entry, config: RunConfig,
                 rows: Sequence[ClientRows] | None) -> list[str]:
    """Holds what a run has read so far against what lies there now.

    A journal of a version that kept no digests of inputs passes; from the next round on they are kept.

    Args:
        rows: of all clients; None where they are not to be had without a rank's libraries.

    Returns:
        what is to be said of a journal that passes unseen.

    Raises:
        JournalError: base, tokenizer, adapter to start from or rows have another content; says which.
    """
    before = entry.config.get("inputs")
    if not before:
        return [f"{journal.folder} is of an earlier version, which did not keep what the base, the tokenizer "
                f"and the rows were: whether they have changed since round {entry.round} is not known. From the "
                "next round on it is kept"]
    if found := changed(config, before, digests(config, rows)):
        raise JournalError(f"{journal.folder}: belongs to a run that has read other files; changed since its "
                           f"round {entry.round}: {'; '.join(found)}. Put back what it has read, give the new "
                           "run its own name with run.name=..., or start anew with --fresh")
    return []


def rows_without_libraries(config: RunConfig) -> list[ClientRows] | None:
    """The rows of all clients; None where only a rank can read them, or says what is wrong with them."""
    if reads_hub(config.data):
        return None
    try:
        return client_rows(config.data, config.run.seed)
    except DataError:
        return None


def digests(config: RunConfig, rows: Sequence[ClientRows] | None) -> dict[str, str]:
    """Gives input -> digest of its content. What cannot be looked at here and now is left out: whoever needs
    it says what is wrong with it.

    Args:
        rows: of all clients of this job, as this machine reads them. One digest covers all and tells of none.
    """
    found: dict[str, str] = {}
    base, tokenizer = _folder(config.model.base), _folder(_tokenizer_place(config))
    if base is not None:
        found[BASE_CONFIG] = _of_config(base / "config.json")
    if base is not None and config.model.init == "pretrained":
        found[BASE_WEIGHTS] = _of_files(sorted(base.glob("*.safetensors")))
    if tokenizer is not None:
        found[TOKENIZER] = _of_files([tokenizer / name for name in TOKENIZER_FILES])
    if (adapter := _folder(config.adapter.start_from)) is not None:
        weights = sorted(adapter.glob("adapter_model*.safetensors"))
        found[ADAPTER] = _of_files([adapter / "adapter_config.json", *weights])
    if rows is not None:
        found[ROWS] = _of_rows(rows)
    return {name: digest for name, digest in found.items() if digest}


def changed(config: RunConfig, before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Says in words what differs of the inputs that are known on both sides."""
    base, data = config.model.base, config.data
    source = f"data.path={data.path}" if data.path else f"data.task={data.task}"
    words = {
        BASE_CONFIG: f"the config.json of model.base={base}",
        BASE_WEIGHTS: f"the weights of model.base={base}",
        TOKENIZER: f"the tokenizer in {_tokenizer_place(config)}",
        ADAPTER: f"the adapter in adapter.start_from={config.adapter.start_from}",
        ROWS: f"the rows of {source}, or how they fall to clients",
    }
    return [words[name] for name in words if name in before and name in now and before[name] != now[name]]


def _tokenizer_place(config: RunConfig) -> str:
    """Where the tokenizer's files are; empty for the built-in one."""
    places = {"auto": config.model.base, "bytes": ""}
    return places.get(config.model.tokenizer, config.model.tokenizer)


def _folder(place: str) -> Path | None:
    """The folder that a path or hub name stands for, without a download; None where there is none."""
    if not place:
        return None
    path = Path(place)
    folder = path.parent if path.is_file() else path
    if folder.is_dir():
        return folder
    if place.count("/") != 1:
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(place, local_files_only=True))
    except Exception:  # noqa: BLE001 - no hub name, or not downloaded yet: the client raises a dozen kinds
        return None


def _of_config(path: Path) -> str:
    try:
        values = json_value(path.read_bytes())
    except (OSError, ValueError):
        return ""
    if isinstance(values, dict):
        values = {key: value for key, value in values.items() if key not in WITHOUT_MEANING}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _of_files(paths: Sequence[Path]) -> str:
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


def _of_rows(clients: Sequence[ClientRows]) -> str:
    state = hashlib.sha256()
    for client in clients:
        for part in (client.train, client.val):
            state.update(f"{client.client}:{len(part)}\n".encode())
            for row in part:
                state.update(json.dumps([row.instruction, row.input, row.output]).encode() + b"\n")
    return state.hexdigest()
