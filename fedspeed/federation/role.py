"""The role of a rank in a federated run."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedspeed.data.clients import ClientData


@dataclass(frozen=True, kw_only=True)
class RankRole:
    """The role of one rank: which clients it trains, and what else it does.

    Attributes:
        clients: data of this rank's clients, by client number; the same on all ranks of a client.
        worker_index: number of the rank among the ranks that train or serve, from 0. ranks: how many these
            are.
        gateway: whether it takes part in exchanges for its clients.
        reporter: whether it commits the journal and reports; exactly one rank does.
        cluster: name of its cluster, which may have its own number of local steps.
        server: whether it is a rank of the method's server. The server's ranks take `Method.server_step`
            together, and the gateway among them sends the result.
        public_rows: rows that the server trains on; None on other ranks.
    """

    clients: Mapping[int, ClientData]
    worker_index: int = 0
    ranks: int = 1
    gateway: bool = True
    reporter: bool = True
    cluster: str = ""
    server: bool = False
    public_rows: ClientData | None = None
