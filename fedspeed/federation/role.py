"""What a rank is in a federated run."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedspeed.data.clients import ClientData


@dataclass(frozen=True, kw_only=True)
class RankRole:
    """Says what one rank is in the run, and for whom it works.

    Attributes:
        clients: data of the clients that this rank carries, by client number; all ranks of a client carry
            the same.
        place: where the rank stands among the ranks that work, from 0. ranks: how many these are.
        gateway: whether it speaks for its clients. reporter: whether it commits the journal and reports
            (exactly one rank does).
        cluster: name of its cluster, which may have its own number of local steps.
        server: whether it is one of the ranks of the method's server, which take its steps together
            (Method.server_step); the gateway among them tells the result.
        public_rows: what the server trains on; None elsewhere.
    """

    clients: Mapping[int, ClientData]
    place: int = 0
    ranks: int = 1
    gateway: bool = True
    reporter: bool = True
    cluster: str = ""
    server: bool = False
    public_rows: ClientData | None = None
