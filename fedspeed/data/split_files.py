"""The split of a task as files: one file of training rows per client, and one of all held-out rows.

Other runs can then train on the rows of one client (data.path=FOLDER/train-client-0.jsonl) or of all of them
(data.path=FOLDER/train-client-*.jsonl) and be evaluated on the same held-out rows (data.held_out).
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from fedspeed.data.clients import MAX_NAMED, ClientRows
from fedspeed.data.rows import Message, Row
from fedspeed.data.templates import question
from fedspeed.errors import DataError
from fedspeed.files import write_atomically
from fedspeed.units import shortened_list

HELD_OUT = "held-out.jsonl"
_KINDS = ("instruction", "messages", "text", "prompt")  # a field that records of one format have


def train_file(client: int | str) -> str:
    """Return the name of the file with a client's training rows; "*" for those of all clients."""
    return f"train-client-{client}.jsonl"


def write_split(folder: Path, clients: Sequence[ClientRows]) -> list[Path]:
    """Write the training rows of each client and the held-out rows of all, and return the files' paths.

    Raises:
        DataError: a file cannot be written; its rows have formats that one file cannot hold; or the folder
            has files of a split into more clients, which a pattern would match too.
    """
    rows = {train_file(client.client): client.train for client in clients}
    rows[HELD_OUT] = tuple(row for client in clients for row in client.val)
    contents = {folder / name: _lines(folder / name, some) for name, some in rows.items() if some}
    _check_others(folder, contents)
    for path, content in contents.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error
    return list(contents)


def record(row: Row) -> dict[str, object]:
    """Return a row as the JSON record that data.task=file reads with its default field names."""
    if row.messages:
        content: dict[str, object] = {"messages": [_message(message) for message in row.messages]}
    elif row.is_text:
        content = {"text": row.output}
    elif row.is_completion:
        content = {"prompt": row.instruction, "completion": row.output}
    else:
        content = {"instruction": row.instruction, "input": row.input, "output": row.output}
    return content | ({"category": row.category} if row.category else {})


def _message(message: Message) -> dict[str, object]:
    written: dict[str, object] = {"role": message.role, "content": message.content}
    return written if message.trained else written | {"weight": 0}


def _check_others(folder: Path, paths: Collection[Path]) -> None:
    """Check that a folder has no file of a split except those that are written now.

    Raises:
        DataError: it has one.
    """
    present = (*sorted(folder.glob(train_file("*"))), *folder.glob(HELD_OUT))
    if others := [path.name for path in present if path not in paths]:
        raise DataError(
            f"{folder}: holds files of another split ({shortened_list(others, MAX_NAMED)}), whose rows would "
            "be taken for rows of this one; remove them, or choose another folder"
        )


def _lines(path: Path, rows: Sequence[Row]) -> bytes:
    """Return rows as lines of JSON, all of one format: the reader knows one for each file.

    Raises:
        DataError: the rows have several formats.
    """
    records = [record(row) for row in rows]
    if any(row.messages for row in rows):
        records = [_conversation(row) for row in rows]
    formats = {kind for written in records for kind in _KINDS if kind in written}
    if len(formats) > 1:
        raise DataError(
            f"{path}: its rows have several formats ({', '.join(sorted(formats))}), and a file has one; give "
            "files of one format in data.path"
        )
    return "".join(json.dumps(written, ensure_ascii=False) + "\n" for written in records).encode()


def _conversation(row: Row) -> dict[str, object]:
    """Return a row of one question and one answer as messages, as a chat template sees it; others as
    `record`.
    """
    if row.messages or row.is_text or row.is_completion:
        return record(row)
    return record(
        replace(row, messages=(Message("user", question(row, "\n\n")), Message("assistant", row.output)))
    )
