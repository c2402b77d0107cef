"""The public rows, which belong to no client and which the server of a method trains on."""

from pathlib import Path

from fedspeed.data.clients import ClientData, ClientRows, encode_client
from fedspeed.data.config import DataConfig
from fedspeed.data.encode import Tokenizer
from fedspeed.data.tasks import rows_of_file, task_of
from fedspeed.errors import DataError

KEY = "federation.public_rows"


def public_data(text: str, config: DataConfig, tokenizer: Tokenizer) -> ClientData:
    """Read and encode public rows; all of them are training rows.

    Args:
        text: the file's path (federation.public_rows).
        config: names the fields of its records, and how a row becomes tokens.

    Raises:
        DataError: there is no such file, it is malformed or has no rows, or data.max_tokens removes all
        answers.
    """
    path = Path(text)
    task = task_of(config)
    if not path.is_file():
        if path.exists():
            raise DataError(f"{KEY}={text}: is no file; name one with a row in each line")
        raise DataError(
            f"{KEY}={text}: no such file on the server's host (looked for {path.resolve()}); "
            "put it there, or correct the path"
        )
    rows = tuple(rows_of_file(path, task, KEY))
    if not rows:
        raise DataError(f"{KEY}={text}: the file holds no rows; name one that has some")
    return encode_client(ClientRows(train=rows, val=(), client=-1), tokenizer, config, owner=f"{KEY}={text}")
