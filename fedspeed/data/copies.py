"""Equal rows over the clients of a split. Pure."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from fedspeed.data.clients import ClientRows
from fedspeed.data.templates import text_of


@dataclass(frozen=True)
class Copies:
    """Counts of rows that a split has more than once.

    Attributes:
        within: training rows of a client that equal an earlier training row of the same client.
        shared: different rows that are training rows of more than one client.
        leaked: held-out rows that are also training rows of some client.
        held_out: number of held-out rows.
    """

    within: int
    shared: int
    leaked: int
    held_out: int


def count_copies(clients: Sequence[ClientRows]) -> Copies:
    """Count the equal rows of a split. Rows are equal if their texts are, whatever their category."""
    owners: dict[Hashable, set[int]] = {}
    for client in clients:
        for row in client.train:
            owners.setdefault(text_of(row), set()).add(client.client)
    held_out = [text_of(row) for client in clients for row in client.val]
    rows = sum(len(client.train) for client in clients)
    return Copies(
        within=rows - sum(map(len, owners.values())),
        shared=sum(len(clients_with_row) > 1 for clients_with_row in owners.values()),
        leaked=sum(text in owners for text in held_out),
        held_out=len(held_out),
    )
