"""From hosts and a number of clients to places: which rank carries which client, in which cluster, through
which gateway.

Pure arithmetic; `place_clients` is the only decision. World ranks number the slots host by host in hostfile
order, which is how the DeepSpeed launchers and a by-slot `mpirun` number them, so every rank can compute the
same topology from the same file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from fedspeed.cluster.hostfile import Host
from fedspeed.config.run import RunConfig
from fedspeed.errors import ConfigError

SERVER = "the server"  # the cluster that its ranks form; no hostfile can call one so


@dataclass(frozen=True)
class RankPlacement:
    """Where one rank stands. `cluster`, `cluster_rank` are None and `clients` is empty on an idle rank; on
    the server's only `clients` is.

    `local_rank` counts the slots of `host` from 0; the accelerator index of the process is the launcher's
    business.
    """

    world_rank: int
    host: str
    local_rank: int
    cluster: str | None
    cluster_rank: int | None
    clients: tuple[int, ...]


@dataclass(frozen=True)
class ClientPlacement:
    """A client and its ranks: consecutive world ranks of one host, or of whole hosts of one cluster.
    `gateway` is the first of them.
    """

    client: int
    cluster: str
    ranks: tuple[int, ...]
    gateway: int


@dataclass(frozen=True)
class ClusterPlacement:
    """A torch world: its ranks ascending, so that `ranks[cluster_rank]` is the world rank, and its clients
    ascending.
    """

    name: str
    ranks: tuple[int, ...]
    clients: tuple[int, ...]


@dataclass(frozen=True)
class Topology:
    """All places. `ranks[world_rank]` and `clients[client]` are addressed by number; `idle` holds the world
    ranks without work, `server` those of the federation's server, empty for a method that has none, and
    `spare` the idle ones of a host that is there to be one.
    """

    ranks: tuple[RankPlacement, ...]
    clients: tuple[ClientPlacement, ...]
    clusters: tuple[ClusterPlacement, ...]
    idle: tuple[int, ...]
    server: tuple[int, ...] = ()
    spare: tuple[int, ...] = ()

    @property
    def gateways(self) -> tuple[int, ...]:
        """The gateway of every client, by client number; clients that share ranks share it."""
        return tuple(client.gateway for client in self.clients)

    @cached_property
    def participants(self) -> tuple[int, ...]:
        """World ranks that take part in the exchange: every gateway once, and the server's first rank,
        ascending.
        """
        return tuple(sorted({*self.gateways, *self.server[:1]}))

    @cached_property
    def contributors(self) -> tuple[int, ...]:
        """World ranks whose values a sum hides among each other's: the participants without the server, which
        adds nothing.
        """
        return tuple(sorted({*self.gateways}))

    @property
    def workers(self) -> tuple[int, ...]:
        """World ranks that carry clients or are the server's, ascending."""
        return tuple(place.world_rank for place in self.ranks if place.cluster is not None)

    def placement(self, world_rank: int) -> RankPlacement:
        return self.ranks[world_rank]

    def worlds(self, pipeline: str) -> dict[str, tuple[int, ...]]:
        """The ranks of each torch world, by its name in messages: a cluster's, or a client's where its ranks
        are a pipeline.

        Args:
            pipeline: value of engine.pipeline.
        """
        if pipeline == "client":
            return {f"client {client.client}": client.ranks for client in self.clients}
        return {f"cluster {cluster.name}": cluster.ranks for cluster in self.clusters}

    def world_of(self, world_rank: int, pipeline: str) -> tuple[int, ...]:
        """The ranks of the torch world that a rank with clients, or one of the server's, is in; `pipeline` as
        for `worlds`, where a server has none.
        """
        return next(ranks for ranks in self.worlds(pipeline).values() if world_rank in ranks)

    def cluster_of(self, name: str) -> ClusterPlacement:
        """The cluster of that name. Raises KeyError: an idle rank has None for a cluster, and no place here."""
        for cluster in self.clusters:
            if cluster.name == name:
                return cluster
        raise KeyError(name)


def place_clients(
    hosts: Sequence[Host], clients: int, ranks_per_client: int | str, *, server: bool = False
) -> Topology:
    """Lays `clients` on the slots of `hosts`.

    Slots are cut into groups of consecutive ranks, and the groups are dealt out in file order:

    - `auto`, at most as many clients as hosts: a group is a whole host, of whatever size;
    - `auto`, more clients than hosts: all groups have the largest size that still leaves one for each client;
    - a number R: all groups have R ranks, each of one host; hosts with fewer slots stay idle;
    - a number R beyond the largest host: a group is whole hosts, one behind the other in one cluster, with R
      slots together;
    - more clients than groups: the groups carry contiguous blocks of clients whose sizes differ by at most
      one.

    Args:
        clients: how many, at least 1.
        ranks_per_client: `auto` or a whole number of at least 1.
        server: whether the method has a server. The host that is one carries no clients; without such a
            method it stays idle.

    Raises:
        ConfigError: no client, no host for clients, no server where there must be one, or a number of ranks
            that the hosts do not offer.
    """
    if clients < 1:
        raise ConfigError(f"data.clients={clients}: there is nothing to lay out; set it to 1 or more")
    if not hosts:
        raise ConfigError("there is no host to lay clients on; name one in the hostfile")
    if all(host.role == "server" for host in hosts):
        raise ConfigError(
            f"the only host, {hosts[0].name}, has role=server and carries no clients; name another one in "
            "the hostfile"
        )
    if server and not any(host.role == "server" for host in hosts):
        raise ConfigError(
            "federation.method has a server, and no host is one; write `# fed-host NAME role=server` in the "
            "hostfile, of a host that carries no clients"
        )
    groups = _groups(hosts, clients, ranks_per_client)
    used = groups[:clients]
    blocks = _even_blocks(clients, len(used))
    return _assemble(
        hosts, [(host, ranks, block) for (host, ranks), block in zip(used, blocks, strict=True)], server
    )


def topology_of(config: RunConfig, hosts: Sequence[Host]) -> Topology:
    """Lay a run's clients, and the server of its method if it has one, on hosts. Raises as `place_clients`
    does.
    """
    return place_clients(
        hosts, config.data.clients, config.cluster.ranks_per_client, server=config.has_server
    )


def warnings(topology: Topology) -> list[str]:
    """What an owner of the machines would want to know about a plan: capacity that stays idle."""
    messages = []
    if topology.spare:
        host = topology.ranks[topology.spare[0]].host
        messages.append(
            f"{host} with {_counted(len(topology.spare), 'rank')} has role=server, and federation.method "
            "has no server: it stays idle; write role=client in the hostfile to use it"
        )
    idle_by_host: dict[str, list[int]] = {}
    for world_rank in sorted({*topology.idle} - {*topology.spare}):
        idle_by_host.setdefault(topology.ranks[world_rank].host, []).append(world_rank)
    working = {place.host for place in topology.ranks if place.clients}
    if whole := [host for host in idle_by_host if host not in working]:
        ranks = sum(len(idle_by_host[host]) for host in whole)
        messages.append(
            f"{_counted(len(whole), 'host')} with {_counted(ranks, 'rank')} idle ({', '.join(whole)}): the "
            f"others are enough for {_counted(len(topology.clients), 'client')}; raise data.clients to use "
            "more"
        )
    if part := [host for host in idle_by_host if host in working]:
        ranks = [world_rank for host in part for world_rank in idle_by_host[host]]
        messages.append(
            f"{_counted(len(ranks), 'rank')} idle on hosts that work ({', '.join(part)}; world ranks "
            f"{', '.join(map(str, ranks))}); another cluster.ranks_per_client or data.clients would use them"
        )
    return messages


def _groups(hosts: Sequence[Host], clients: int, ranks_per_client: int | str) -> list[tuple[Host, range]]:
    """Groups of world ranks in file order, at least one; more of them than clients are capacity left over."""
    carrying = [host for host in hosts if host.role == "client"]
    if ranks_per_client == "auto":
        if clients <= len(carrying):
            return _cut(hosts, None)
        largest = max(host.slots for host in carrying)
        size = next(
            (
                size
                for size in range(largest, 1, -1)
                if sum(host.slots // size for host in carrying) >= clients
            ),
            1,
        )
        return _cut(hosts, size)
    size = ranks_per_client
    largest = max(carrying, key=lambda host: host.slots)
    if size > largest.slots:
        if groups := _joined(hosts, size):
            return groups
        raise ConfigError(
            f"cluster.ranks_per_client={size}: the largest host ({largest.name}) has slots={largest.slots}, "
            f"and no neighbours of one cluster have {size} together; ask for at most {largest.slots} or "
            "what whole hosts have, or raise slots in the hostfile"
        )
    groups = _cut(hosts, size)
    for host in dict.fromkeys(host for host, _ in groups[:clients]):
        if rest := host.slots % size:
            divisors = [str(number) for number in range(1, host.slots + 1) if host.slots % number == 0]
            raise ConfigError(
                f"cluster.ranks_per_client={size}: leaves {rest} of the {host.slots} slots of {host.name} "
                f"unused; ask for {' or '.join(divisors)}, or write slots={host.slots - rest} for "
                f"{host.name}"
            )
    return groups


def _cut(hosts: Sequence[Host], size: int | None) -> list[tuple[Host, range]]:
    """Ranks of each host that carries clients, in pieces of `size` (None: one piece); what is left over
    belongs to no piece.
    """
    pieces = []
    start = 0
    for host in hosts:
        step = size or host.slots
        if host.role == "client":
            pieces += [
                (host, range(first, first + step))
                for first in range(start, start + host.slots - step + 1, step)
            ]
        start += host.slots
    return pieces


def _joined(hosts: Sequence[Host], size: int) -> list[tuple[Host, range]]:
    """Neighbouring hosts of one cluster that have `size` slots together, named by the first of them; what is
    left over belongs to no piece.
    """
    pieces, run, end = [], [], 0  # run: hosts, and where their ranks begin
    for host in hosts:
        if host.role == "server":
            run = []
            end = end + host.slots
            continue
        run = [*(run if run and run[0][0].cluster == host.cluster else []), (host, end)]
        end += host.slots
        while end - run[0][1] > size:
            run.pop(0)
        if end - run[0][1] == size:
            pieces.append((run[0][0], range(run[0][1], end)))
            run = []
    return pieces


def _even_blocks(clients: int, groups: int) -> list[range]:
    """Contiguous blocks of client numbers; the first groups, on the faster hosts, take the surplus."""
    size, surplus = divmod(clients, groups)
    blocks = []
    start = 0
    for group in range(groups):
        stop = start + size + (group < surplus)
        blocks.append(range(start, stop))
        start = stop
    return blocks


def _assemble(hosts: Sequence[Host], dealt: list[tuple[Host, range, range]], server: bool) -> Topology:
    cluster_ranks: dict[str, list[int]] = {}
    cluster_clients: dict[str, list[int]] = {}
    carried: dict[int, tuple[int, ...]] = {}
    clients = []
    for host, ranks, block in dealt:
        cluster_ranks.setdefault(host.cluster, []).extend(ranks)
        cluster_clients.setdefault(host.cluster, []).extend(block)
        carried.update(dict.fromkeys(ranks, tuple(block)))
        clients += [ClientPlacement(client, host.cluster, tuple(ranks), ranks[0]) for client in block]
    slots = [(host, local_rank) for host in hosts for local_rank in range(host.slots)]
    places = []
    serving = []
    spare = []
    for world_rank, (host, local_rank) in enumerate(slots):
        if world_rank in carried:
            cluster_rank = cluster_ranks[host.cluster].index(world_rank)
            places.append(
                RankPlacement(
                    world_rank,
                    host.name,
                    local_rank,
                    cluster=host.cluster,
                    cluster_rank=cluster_rank,
                    clients=carried[world_rank],
                )
            )
        elif server and host.role == "server":
            serving.append(world_rank)
            places.append(
                RankPlacement(
                    world_rank, host.name, local_rank, cluster=SERVER, cluster_rank=local_rank, clients=()
                )
            )
        else:
            spare += [world_rank] * (host.role == "server")
            places.append(
                RankPlacement(world_rank, host.name, local_rank, cluster=None, cluster_rank=None, clients=())
            )
    clusters = tuple(
        ClusterPlacement(name, tuple(ranks), tuple(cluster_clients[name]))
        for name, ranks in cluster_ranks.items()
    )
    if serving:
        clusters = (*clusters, ClusterPlacement(SERVER, tuple(serving), ()))
    idle = tuple(place.world_rank for place in places if place.cluster is None)
    return Topology(
        tuple(places), tuple(clients), clusters, idle=idle, server=tuple(serving), spare=tuple(spare)
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
