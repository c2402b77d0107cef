"""The data of each client: its training rows and held-out rows, as text and as tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fedspeed import activity
from fedspeed.data import splitters, streams
from fedspeed.data.config import DataConfig
from fedspeed.data.encode import Encoded, Example, Tokenizer
from fedspeed.data.packing import Sequences, pack
from fedspeed.data.prompt_template import PromptTemplate, template_for
from fedspeed.data.row_counts import RowCounts
from fedspeed.data.rows import Row
from fedspeed.data.tasks import TaskRows, held_out_rows, load_task_rows
from fedspeed.data.templates import text_of
from fedspeed.errors import DataError
from fedspeed.units import shortened_list

MAX_NAMED = 8  # files in a message


@dataclass(frozen=True)
class ClientRows:
    """The rows of one client. `val` is what it evaluates: rows of its own that are held out from training, or
    its share of the rows of data.held_out. It may be empty. `source` is its file, where data.split=file.
    """

    train: tuple[Row, ...]
    val: tuple[Row, ...]
    client: int
    source: str = ""


@dataclass(frozen=True)
class ClientData:
    """The encoded rows of one client.

    Attributes:
        counts: of the rows, training and held-out ones together.
        pad_id: token id of padding; it is masked everywhere, so any id will do.
        limit: data.max_tokens, which no batch is padded beyond.
        packed: with data.packing, the numbers of the training rows in each sequence; else None.
    """

    train: list[Example]
    val: list[Example]
    pad_id: int
    limit: int | None = None
    counts: RowCounts = RowCounts(0, 0, 0)
    packed: Sequences | None = None

    @cached_property
    def sequences(self) -> Sequences:
        """Return the numbers of the training rows in each sequence that is trained on: one row each, unless
        they are packed.
        """
        return tuple((row,) for row in range(len(self.train))) if self.packed is None else self.packed

    @property
    def longest(self) -> int:
        """Return the number of tokens of the longest sequence that is trained on."""
        return max(sum(len(self.train[row].input_ids) for row in rows) for rows in self.sequences)

    @property
    def weight(self) -> float:
        """Return the client's weight in a sum: the answer tokens of its training rows."""
        return float(sum(row.answer_tokens for row in self.train))


def client_rows(config: DataConfig, seed: int) -> list[ClientRows]:
    """Return the rows of every client, the same on every rank.

    Rows are assigned to clients first, and each client then holds out some of its own. So a client is
    evaluated on the categories that it trains on, and the federation on those of all clients.

    With data.held_out, all assigned rows are training rows. Row i of data.held_out is evaluated at client
    i modulo data.clients, so that the sum over all clients counts each row once.

    Raises:
        DataError: see `load_rows` and `splitters`; or the split needs categories and the rows have none.
    """
    with activity.during("the reading of rows"):
        loaded = load_task_rows(config, seed)
        held_out = held_out_rows(config)
    split = _split(config, loaded, np.random.default_rng([seed, streams.SPLIT]))
    clients = []
    for client, indices in enumerate(split):
        own = [loaded.rows[i] for i in indices]
        source = loaded.sources[client] if config.split == "file" else ""
        if config.held_out:
            share = tuple(held_out[client :: config.clients])
            clients.append(ClientRows(tuple(own), share, client, source))
        else:
            clients.append(replace(_held_out(client, own, config, seed), source=source))
    return clients


def encode_client(rows: ClientRows, tokenizer: Tokenizer, config: DataConfig, owner: str = "") -> ClientData:
    """Return the encoded rows of one client; each rank encodes those of its own clients.

    Args:
        owner: whose rows these are, for messages; empty: the client.

    Raises:
        DataError: no training row keeps an answer within data.max_tokens; or the template cannot express a
            row, which is named.
    """
    template = template_for(config, tokenizer)
    all_rows = activity.counted((*rows.train, *rows.val), "the encoding of rows", "row")
    encoded = [encode_row(row, template) for row in all_rows]
    train = [example for row in encoded[: len(rows.train)] for example in row.examples]
    val = [example for row in encoded[len(rows.train) :] for example in row.examples]
    if not train:
        effect = "cuts away the whole answer"
        if config.too_long != "cut":
            effect = f"with data.too_long={config.too_long} leaves nothing"
        raise DataError(
            f"{owner or f'client {rows.client}'}: data.max_tokens={config.max_tokens} {effect} of each of "
            f"its {len(rows.train)} training rows (template {template.name}); raise data.max_tokens"
        )
    # The pad token of many tokenizers was added beyond the model's vocabulary, so padding uses no id above
    # those of the rows.
    pad_id = min(tokenizer.pad_token_id, max(int(example.input_ids.max()) for example in (*train, *val)))
    counts = count_rows(encoded)
    packed = None
    if config.packing:
        packed = pack([len(example.input_ids) for example in train], config.max_tokens, rows.client)
        counts = replace(counts, packed=len(train), sequences=len(packed))
    return ClientData(train, val, pad_id=pad_id, limit=config.max_tokens, counts=counts, packed=packed)


def largest_id(data: ClientData) -> int:
    """Return the largest token id in a client's data, padding included."""
    return max(data.pad_id, *(int(example.input_ids.max()) for example in (*data.train, *data.val)))


def encode_row(row: Row, template: PromptTemplate) -> Encoded:
    """Return the examples of a row.

    Raises:
        DataError: see `PromptTemplate.encode`; names the row.
    """
    try:
        return template.encode(row)
    except DataError as error:
        text = row.instruction or row.output
        where = row.where or f"the row that begins with {text[:40]!r}"
        raise DataError(f"{where}: {error}") from None


def count_rows(encoded: Sequence[Encoded]) -> RowCounts:
    """Return the counts of encoded rows; packing is not among them."""
    return RowCounts(
        len(encoded),
        cut=sum(row.cut for row in encoded),
        lost=sum(not row.examples and not row.dropped for row in encoded),
        dropped=sum(row.dropped for row in encoded),
        kept_end=sum(row.kept_end for row in encoded),
    )


def _split(config: DataConfig, loaded: TaskRows, rng: np.random.Generator) -> list[np.ndarray]:
    if config.split == "iid":
        return splitters.iid(len(loaded.rows), config.clients, rng)
    if config.split == "file":
        _check_files(config, loaded.sources)
        return splitters.by_source(loaded.source_of, config.clients)
    categories = [row.category for row in loaded.rows]
    if not any(categories):
        field_hint = ""
        if config.task == "file":
            field_hint = (
                f" (for task=file: data.category_field={config.category_field} names no field of the rows)"
            )
        raise DataError(
            f"data.split={config.split} splits by category and no row of task {config.task} has one; use "
            f"data.split=iid{field_hint}"
        )
    if config.split == "meta":
        return splitters.meta(categories, config.clients, rng)
    return splitters.lda(categories, config.clients, config.alpha, rng)


def _check_files(config: DataConfig, sources: Sequence[str]) -> None:
    """Check that data.path names one file per client, where data.split=file.

    Raises:
        DataError: it names more or fewer.
    """
    if len(sources) != config.clients:
        count = len(sources)
        raise DataError(
            f"data.split=file makes each file of data.path a client: {config.source} has {count} "
            f"file{'' if count == 1 else 's'} ({shortened_list(sources, MAX_NAMED)}) and "
            f"data.clients={config.clients}; set data.clients={count}, or name other files"
        )


def _held_out(client: int, rows: list[Row], config: DataConfig, seed: int) -> ClientRows:
    order = np.random.default_rng([seed, streams.HOLDOUT, client]).permutation(len(rows))
    val = set(splitters.hold_out(order, [text_of(row) for row in rows], _n_val(len(rows), config)))
    return ClientRows(
        train=tuple(row for i, row in enumerate(rows) if i not in val),
        val=tuple(rows[i] for i in sorted(val)),
        client=client,
    )


def _n_val(n_rows: int, config: DataConfig) -> int:
    """Return how many rows a client holds out: at least one where data.val_fraction is above 0, but never its
    only row.
    """
    if config.val_fraction == 0:
        return 0
    return min(max(1, round(n_rows * config.val_fraction)), config.max_val_rows, n_rows - 1)
