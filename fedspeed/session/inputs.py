"""What a run has read, by its content. A resumed run must go on with the same base, tokenizer, adapter and
rows, not only with the same names of them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedspeed.checkpoint.journal import Entry, Journal
from fedspeed.config.run import RunConfig
from fedspeed.data.clients import ClientRows, client_rows
from fedspeed.data.tasks import reads_hub
from fedspeed.errors import DataError, JournalError
from fedspeed.models import content
from fedspeed.models.local_config import TOKENIZER_FILES, local_folder, tokenizer_place
from fedspeed.session.deployment import deployment_of

BASE_CONFIG = "base config"
BASE_WEIGHTS = "base weights"
TOKENIZER = "tokenizer"
ADAPTER = "adapter"
ROWS = "rows"


def check_inputs(
    journal: Journal, entry: Entry, config: RunConfig, rows: Sequence[ClientRows] | None
) -> list[str]:
    """Holds what a run has read so far against what lies there now.

    A journal of a version that kept no digests of inputs passes, and so do rows that were noted with another
    key; from the next round on they are kept.

    Args:
        rows: of all clients; None where they are not to be had without a rank's libraries.

    Returns:
        what is to be said of a journal that passes unseen.

    Raises:
        JournalError: base, tokenizer, adapter to start from or rows have another content; says which.
    """
    before = entry.config.get("inputs")
    if not before:
        return [
            f"{journal.folder} is of an earlier version, which did not keep what the base, the tokenizer "
            f"and the rows were: whether they have changed since round {entry.round} is not known. From "
            "the next round on it is kept"
        ]
    now = journal_digests(config, rows)
    if found := changed(config, before, now):
        raise JournalError(
            f"{journal.folder}: belongs to a run that has read other files; changed since its "
            f"round {entry.round}: {'; '.join(found)}. Put back what it has read, give the "
            "new run its own name with run.name=..., or start anew with --fresh"
        )
    if ROWS in before and ROWS in now and not _same_key(before[ROWS], now[ROWS]):
        return [
            f"{journal.folder}: its digest of the rows was not made with the key in routing.identity="
            f"{config.routing.identity}: whether the rows have changed since round {entry.round} is not "
            "known. From the next round on the digest is made with this key"
        ]
    return []


def rows_without_libraries(config: RunConfig) -> list[ClientRows] | None:
    """The rows of all clients; None where only a rank can read them, or says what is wrong with them."""
    if reads_hub(config.data):
        return None
    try:
        return client_rows(config.data, config.run.seed)
    except DataError:
        return None


def journal_digests(config: RunConfig, rows: Sequence[ClientRows] | None) -> dict[str, str]:
    """Return the digests as a journal keeps them: that of the rows as `Deployment.seal_rows` leaves it.

    Raises:
        FedSpeedError: the key of routing.identity cannot be read.
    """
    found = digests(config, rows)
    if ROWS in found:
        found[ROWS] = deployment_of(config).seal_rows(found[ROWS])
    return found


def digests(config: RunConfig, rows: Sequence[ClientRows] | None) -> dict[str, str]:
    """Gives input -> digest of its content. What cannot be looked at here and now is left out: whoever needs
    it says what is wrong with it.

    Args:
        rows: of all clients of this job, as this machine reads them. One digest covers all and tells of none.
    """
    found: dict[str, str] = {}
    base = _folder(config.model.base)
    tokenizer = _folder(tokenizer_place(config.model))
    if base is not None:
        found[BASE_CONFIG] = content.of_config(base / "config.json")
    if base is not None and config.model.init == "pretrained":
        found[BASE_WEIGHTS] = content.of_weights(base)
    if tokenizer is not None:
        found[TOKENIZER] = content.of_files([tokenizer / name for name in TOKENIZER_FILES])
    if (adapter := _folder(config.adapter.start_from)) is not None:
        weights = sorted(adapter.glob("adapter_model*.safetensors"))
        found[ADAPTER] = content.of_files([adapter / "adapter_config.json", *weights])
    if rows is not None:
        found[ROWS] = _of_rows(rows)
    return {name: digest for name, digest in found.items() if digest}


def changed(config: RunConfig, before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Says in words what differs of the inputs that are known on both sides."""
    known = {name for name in before if name in now and (name != ROWS or _same_key(before[name], now[name]))}
    return [text for name, text in words(config).items() if name in known and before[name] != now[name]]


def words(config: RunConfig) -> dict[str, str]:
    """Input -> what it is called in a message."""
    base = config.model.base
    data = config.data
    source = f"data.path={data.path}" if data.path else f"data.task={data.task}"
    return {
        BASE_CONFIG: f"the config.json of model.base={base}",
        BASE_WEIGHTS: f"the weights of model.base={base}",
        TOKENIZER: f"the tokenizer in {tokenizer_place(config.model)}",
        ADAPTER: f"the adapter in adapter.start_from={config.adapter.start_from}",
        ROWS: f"the rows of {source}, or how they fall to clients",
    }


def _folder(place: str) -> Path | None:
    """The folder that a base, tokenizer or adapter is in, without a download; None where there is none."""
    return local_folder(place, weights=False) if place else None


def _same_key(one: str, other: str) -> bool:
    """Whether two digests of rows were made with the same key, or both without one."""
    return one.rpartition(":")[0] == other.rpartition(":")[0]


def _of_rows(clients: Sequence[ClientRows]) -> str:
    state = hashlib.sha256()
    for client in clients:
        for part in (client.train, client.val):
            state.update(f"{client.client}:{len(part)}\n".encode())
            for row in part:
                state.update(json.dumps([row.instruction, row.input, row.output]).encode() + b"\n")
    return state.hexdigest()
