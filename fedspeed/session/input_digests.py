"""Digests of the inputs of a run: base, tokenizer, adapter and rows.

A resumed run must have inputs of the same content, not only of the same name.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedspeed.checkpoint.journal import Entry, Journal
from fedspeed.config.run import RunConfig
from fedspeed.data.clients import ClientRows, client_rows
from fedspeed.data.config import path_text
from fedspeed.data.rows import digested_fields
from fedspeed.data.sources import reads_hub
from fedspeed.errors import DataError, JournalError
from fedspeed.models import file_digests
from fedspeed.models.local_config import MORE_TOKENIZER_FILES, TOKENIZER_FILES, local_folder, tokenizer_place
from fedspeed.session.deployment import deployment_of

BASE_CONFIG = "base config"
BASE_WEIGHTS = "base weights"
TOKENIZER = "tokenizer"
MORE_TOKENIZER = "more of the tokenizer"  # not in journals of earlier versions
ADAPTER = "adapter"
CHAT_TEMPLATE = "chat template"
ROWS = "rows"


def check_inputs(
    journal: Journal, entry: Entry, config: RunConfig, rows: Sequence[ClientRows] | None
) -> list[str]:
    """Compare the inputs of a run with those that its journal names.

    A journal of an earlier version without digests passes, and so does a digest of rows that was made with
    another key. The next round stores new digests.

    Args:
        rows: of all clients; None where they cannot be read without the libraries of a rank.

    Returns:
        remarks about what could not be compared.

    Raises:
        JournalError: base, tokenizer, adapter to start from or rows have changed; names them.
    """
    before = entry.config.get("inputs")
    if not before:
        return [
            f"{journal.folder} is of an earlier version, which stored no digests of the base, the "
            f"tokenizer and the rows: whether they have changed since round {entry.round} is not known. The "
            "next round stores them"
        ]
    now = journal_digests(config, rows)
    if found := changed(config, before, now):
        raise JournalError(
            f"{journal.folder}: belongs to a run with other inputs; changed since its "
            f"round {entry.round}: {'; '.join(found)}. Restore them, give the "
            "new run its own name with run.name=..., or start anew with --fresh"
        )
    if ROWS in before and ROWS in now and not _same_key(before[ROWS], now[ROWS]):
        return [
            f"{journal.folder}: its digest of the rows was made with another key than routing.identity="
            f"{config.routing.identity}: whether the rows have changed since round {entry.round} is not "
            "known. The next round stores a digest made with this key"
        ]
    return []


def rows_without_libraries(config: RunConfig) -> list[ClientRows] | None:
    """Return the rows of all clients; None where only a rank can read them, or report their fault."""
    if reads_hub(config.data):
        return None
    try:
        return client_rows(config.data, config.run.seed)
    except DataError:
        return None


def journal_digests(config: RunConfig, rows: Sequence[ClientRows] | None) -> dict[str, str]:
    """Return the digests as a journal stores them: that of the rows in the form of `Deployment.seal_rows`.

    Raises:
        FedSpeedError: the key of routing.identity cannot be read.
    """
    found = digests(config, rows)
    if ROWS in found:
        found[ROWS] = deployment_of(config).seal_rows(found[ROWS])
    return found


def digests(config: RunConfig, rows: Sequence[ClientRows] | None) -> dict[str, str]:
    """Return input -> digest of its content, for the inputs that can be read.

    The others are left out; the code that needs them reports their fault.

    Args:
        rows: of all clients of this job, as this machine reads them. One digest covers all of them, so that
            it tells nothing about a single row.
    """
    found: dict[str, str] = {}
    base = _folder(config.model.base)
    tokenizer = _folder(tokenizer_place(config.model))
    if base is not None:
        found[BASE_CONFIG] = file_digests.config_digest(base / "config.json")
    if base is not None and config.model.init == "pretrained":
        found[BASE_WEIGHTS] = file_digests.weights_digest(base)
    if tokenizer is not None:
        found[TOKENIZER] = file_digests.files_digest([tokenizer / name for name in TOKENIZER_FILES])
        more = file_digests.files_digest([tokenizer / name for name in MORE_TOKENIZER_FILES])
        found[MORE_TOKENIZER] = more or "none"
    if (adapter := _folder(config.adapter.start_from)) is not None:
        weights = sorted(adapter.glob("adapter_model*.safetensors"))
        found[ADAPTER] = file_digests.files_digest([adapter / "adapter_config.json", *weights])
    if config.data.chat_template:
        found[CHAT_TEMPLATE] = file_digests.files_digest([Path(config.data.chat_template)])
    if rows is not None:
        found[ROWS] = _rows_digest(rows)
    return {name: digest for name, digest in found.items() if digest}


def changed(config: RunConfig, before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Describe the inputs whose digests differ, of those that are known before and now."""
    known = {name for name in before if name in now and (name != ROWS or _same_key(before[name], now[name]))}
    return [
        text for name, text in descriptions(config).items() if name in known and before[name] != now[name]
    ]


def descriptions(config: RunConfig) -> dict[str, str]:
    """Return input -> its description in messages."""
    base = config.model.base
    held_out = f" and of data.held_out={path_text(config.data.held_out)}" if config.data.held_out else ""
    return {
        BASE_CONFIG: f"the config.json of model.base={base}",
        BASE_WEIGHTS: f"the weights of model.base={base}",
        TOKENIZER: f"the tokenizer in {tokenizer_place(config.model)}",
        MORE_TOKENIZER: f"the tokenizer in {tokenizer_place(config.model)} (its vocabulary or chat template)",
        ADAPTER: f"the adapter in adapter.start_from={config.adapter.start_from}",
        CHAT_TEMPLATE: f"data.chat_template={config.data.chat_template}",
        ROWS: f"the rows of {config.data.source}{held_out}, or their split over clients",
    }


def _folder(place: str) -> Path | None:
    """Return the local folder of a base, tokenizer or adapter; None where there is none. No download."""
    return local_folder(place, weights=False) if place else None


def _same_key(one: str, other: str) -> bool:
    """Return whether two digests of rows were made with the same key, or both without a key."""
    return one.rpartition(":")[0] == other.rpartition(":")[0]


def _rows_digest(clients: Sequence[ClientRows]) -> str:
    state = hashlib.sha256()
    for client in clients:
        for part in (client.train, client.val):
            state.update(f"{client.client}:{len(part)}\n".encode())
            for row in part:
                state.update(json.dumps(digested_fields(row)).encode() + b"\n")
    return state.hexdigest()
