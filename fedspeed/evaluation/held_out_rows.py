"""The held-out rows that evaluation tasks read: those of a run's clients, or of a file."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from fedspeed.data.clients import client_rows
from fedspeed.data.config import DataConfig
from fedspeed.data.rows import Row, digested_fields
from fedspeed.data.tasks import rows_of_file, task_of
from fedspeed.errors import DataError
from fedspeed.evaluation.context import TaskContext
from fedspeed.files import sha256_of


def held_out_rows(context: TaskContext, limit: int = 0) -> list[Row]:
    """Return held-out rows. A row of a run without a category gets the name of its client as one.

    With a limit, the clients' rows are taken in turns, so that every client is represented.

    Args:
        limit: most rows; 0: all.

    Raises:
        DataError: there are none, with what to do about it.
    """
    if context.held_out is not None:
        rows = _of_file(context, context.held_out)
    else:
        rows = _of_clients(context)
    return rows[:limit] if limit else rows


def held_out_digests(context: TaskContext) -> dict[str, str]:
    """Return the SHA-256 of the named file; else one of all rows that the run's clients hold out."""
    if context.held_out is not None:
        return {context.held_out.name: sha256_of(context.held_out)}
    fields = [digested_fields(row) for row in held_out_rows(context)]
    return {"held-out rows": hashlib.sha256(json.dumps(fields).encode()).hexdigest()}


def _of_file(context: TaskContext, path: Path) -> list[Row]:
    data = context.data or DataConfig(task="file")
    rows = rows_of_file(path, task_of(data), "--held-out")
    if not rows:
        raise DataError(f"--held-out {path}: the file has no rows; name another one")
    return rows


def names_rows(data: DataConfig) -> bool:
    """Return whether a configuration names rows, so that held-out rows follow from it."""
    return data.task != "file" or bool(data.path or data.held_out)


def _of_clients(context: TaskContext) -> list[Row]:
    if context.data is None or not names_rows(context.data):
        raise DataError(
            f"evaluation task {context.name}: a base has no held-out rows of its own; name a file of rows "
            "with --held-out, or give the run whose rows are meant"
        )
    clients = client_rows(context.data, context.seed)
    is_common = bool(context.data.held_out)  # rows of nobody: they are only distributed over the clients
    chosen = [
        [
            replace(row, category=row.category or ("" if is_common else f"client {of.client}"))
            for row in of.val
        ]
        for of in clients
    ]
    longest = max(map(len, chosen), default=0)
    rows = [rows[index] for index in range(longest) for rows in chosen if index < len(rows)]
    if not rows:
        raise DataError(
            f"evaluation task {context.name}: no client holds out rows (data.val_fraction="
            f"{context.data.val_fraction:g}); raise it, or name a file with --held-out"
        )
    return rows
