"""Remarks on the rows before training: what is allowed, but probably a mistake. All counts are over all
clients, so that they reveal nothing of a single one.
"""

from collections.abc import Sequence

from fedspeed.data.clients import ClientRows
from fedspeed.data.config import DataConfig
from fedspeed.data.copies import count_copies
from fedspeed.data.rows import Row


def row_remarks(config: DataConfig, clients: Sequence[ClientRows]) -> list[str]:
    """Return a sentence for each remark on the rows of all clients."""
    rows = [row for client in clients for row in (*client.train, *client.val)]
    remarks = [_blank_answers(rows), _no_category(config, rows), _nothing_held_out(config, clients)]
    return [text for text in remarks if text] + _copies(config, clients)


def _blank_answers(rows: Sequence[Row]) -> str:
    blank = sum(not all(answer.strip() for answer in _answers(row)) for row in rows)
    if not blank:
        return ""
    return (
        f"{blank} of {len(rows)} rows have a blank answer: the model learns to say nothing there; fill it "
        "in, or remove these rows"
    )


def _answers(row: Row) -> list[str]:
    """Return the texts of a row that are trained on."""
    trained = [message.content for message in row.messages if message.role == "assistant" and message.trained]
    return trained or [row.output]


def _no_category(config: DataConfig, rows: Sequence[Row]) -> str:
    without = sum(not row.category for row in rows)
    if config.split in ("iid", "file") or not without:
        return ""
    return (
        f"{without} of {len(rows)} rows have no category: data.split={config.split} treats them as one "
        "category; fill the field in, or remove these rows"
    )


def _nothing_held_out(config: DataConfig, clients: Sequence[ClientRows]) -> str:
    without = sum(not client.val for client in clients)
    if not without or (not config.val_fraction and not config.held_out):
        return ""
    if config.held_out:
        return (
            f"clients that evaluate no row, because data.held_out has fewer rows than there are clients: "
            f"{without} of {len(clients)}; the held-out loss is that of the others"
        )
    return (
        f"clients that hold out no row, because they have one only or all of theirs are equal: {without} "
        f"of {len(clients)}; the held-out loss is that of the others"
    )


def _copies(config: DataConfig, clients: Sequence[ClientRows]) -> list[str]:
    """Return remarks on rows that several clients have. The hold-out separates equal rows of one client, but
    cannot separate those of different clients, which are not compared.
    """
    copies = count_copies(clients)
    owner = "a client" if config.held_out else "another client"
    remarks = []
    if copies.shared:
        remarks.append(f"{copies.shared} different rows are training rows of more than one client")
    if copies.leaked:
        remarks.append(
            f"{copies.leaked} of {copies.held_out} held-out rows are also training rows of {owner}: the "
            "held-out loss is too good for them; remove the copies from the data"
        )
    return remarks
