"""Organisations of one roster on this machine, for tests."""

import threading

from fedspeed.routing import identity
from fedspeed.routing.config import RoutingConfig
from fedspeed.routing.listen_address import listen_address
from fedspeed.routing.transports.tls import TlsTransport
from tests.limits import LIMIT_S
from tests.processes import free_ports


class Sites:
    """The keys, roster and transports of organisations that listen on loopback."""

    def __init__(self, folder, size: int, epoch: int = 1):
        self.folder = folder
        self.size = size
        cards = [
            identity.read_card(identity.make(f"site{i}", f"127.0.0.1:{port}", folder)[1])
            for i, port in enumerate(free_ports(size))
        ]
        identity.make("operator", "127.0.0.1:1", folder)
        self.signer = identity.read_key(folder / "operator.key")
        self.pinned = identity.read_card(folder / "operator.json").key.hex()
        self.roster_file = folder / "roster.json"
        self.roster_file.write_text(identity.sign_roster(cards, self.signer, epoch))
        self.roster = identity.read_roster(self.roster_file, self.pinned)

    @classmethod
    def in_folder(cls, folder, size: int) -> "Sites":
        """Return the sites that another process has made in a folder."""
        sites = cls.__new__(cls)
        sites.folder = folder
        sites.size = size
        sites.pinned = identity.read_card(folder / "operator.json").key.hex()
        sites.roster_file = folder / "roster.json"
        sites.roster = identity.read_roster(sites.roster_file, sites.pinned)
        return sites

    def routing(self, i: int, **more) -> RoutingConfig:
        """Return the routing configuration of site i."""
        return RoutingConfig(
            transport="tls",
            identity=str(self.folder / f"site{i}.key"),
            roster=str(self.roster_file),
            roster_signer=self.pinned,
            **more,
        )

    def transport(
        self, i: int, timeout_s: float = LIMIT_S, roster=None, key: str | None = None
    ) -> TlsTransport:
        """Connect site i to the others. roster, key: in place of the common roster and its own key file."""
        listen = listen_address(self.routing(i), self.roster.members[i])
        return TlsTransport(
            str(self.folder / (key or f"site{i}.key")),
            self.roster.keys[i],
            roster or self.roster,
            timeout_s,
            listen,
        )

    def all(self, crowded=lambda: None, timeout_s: float = LIMIT_S, first: int = 0) -> list[TlsTransport]:
        """Connect all sites to each other, and return their transports.

        Args:
            crowded: called once the first site listens, before any other one starts.
            first: start only the first so many sites here. 0: all.
        """
        count = first or self.size
        transports: list = [None] * count

        def connect(i):
            transports[i] = self.transport(i, timeout_s)

        threads = [threading.Thread(target=connect, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
            if thread is threads[0]:
                crowded()
        for thread in threads:
            thread.join(LIMIT_S)
        return transports
