"""The split of a task as files: one file of training rows per client, and one of all held-out rows.

Other runs can then train on the rows of one client (data.path=FOLDER/train-client-0.jsonl) or of all of them
(data.path=FOLDER/train-client-*.jsonl) and be evaluated on the same held-out rows (data.held_out).
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedspeed.data.clients import ClientRows
from fedspeed.data.rows import Message, Row
from fedspeed.errors import DataError
from fedspeed.files import write_atomically

HELD_OUT = "held-out.jsonl"


def train_file(client: int) -> str:
    """Return the name of the file with a client's training rows."""
    return f"train-client-{client}.jsonl"


def write_split(folder: Path, clients: Sequence[ClientRows]) -> list[Path]:
    """Write the training rows of each client and the held-out rows of all, and return the files' paths.

    Raises:
        DataError: a file cannot be written.
    """
    contents = {train_file(client.client): client.train for client in clients}
    contents[HELD_OUT] = tuple(row for client in clients for row in client.val)
    paths = []
    for name, rows in contents.items():
        if rows:
            paths.append(folder / name)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(folder / name, _lines(rows))
            except OSError as error:
                raise DataError(
                    f"{folder / name}: cannot be written ({error.strerror}); choose another folder"
                ) from error
    return paths


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


def _lines(rows: Iterable[Row]) -> bytes:
    return "".join(json.dumps(record(row), ensure_ascii=False) + "\n" for row in rows).encode()
