"""Placement of clients on hosts: which rank carries which client, in which cluster, through which gateway.

Pure arithmetic; `place_clients` is the only decision. World ranks number the slots host by host in the order
of the hostfile, as the DeepSpeed launchers and a by-slot `mpirun` do, so every rank computes the same
topology from the same file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from fedspeed.cluster.hostfile import Host
from fedspeed.config.run import RunConfig
from fedspeed.errors import ConfigError

# Name of the cluster that the server's ranks form. No hostfile can contain it.
SERVER = "the server"


@dataclass(frozen=True)
class RankPlacement:
    """The host, cluster and clients of one rank.

    `local_rank` counts the slots of `host` from 0; which accelerator the process uses is up to the launcher.
    On an idle rank `cluster` and `cluster_rank` are None and `clients` is empty; on a rank of the server only
    `clients` is empty.
    """

    world_rank: int
    host: str
    local_rank: int
    cluster: str | None
    cluster_rank: int | None
    clients: tuple[int, ...]


@dataclass(frozen=True)
class ClientPlacement:
    """The ranks of a client: consecutive world ranks of one host, or of whole hosts of one cluster.

    `gateway` is the first of them.
    """

    client: int
    cluster: str
    ranks: tuple[int, ...]
    gateway: int


@dataclass(frozen=True)
class ClusterPlacement:
    """The ranks and clients of a cluster, which is one torch world; both ascending.

    The world rank of a cluster rank is `ranks[cluster_rank]`.
    """

    name: str
    ranks: tuple[int, ...]
    clients: tuple[int, ...]


@dataclass(frozen=True)
class Topology:
    """The placement of all ranks, clients and clusters.

    Attributes:
        ranks: by world rank.
        clients: by client number.
        clusters: in the order of their first ranks; the server's last.
        idle: world ranks without work.
        server: world ranks of the federation's server; empty for a method without one.
        spare: the idle ranks of a host with role=server, where the method has no server.
    """

    ranks: tuple[RankPlacement, ...]
    clients: tuple[ClientPlacement, ...]
    clusters: tuple[ClusterPlacement, ...]
    idle: tuple[int, ...]
    server: tuple[int, ...] = ()
    spare: tuple[int, ...] = ()

    @property
    def gateways(self) -> tuple[int, ...]:
        """Return the gateway of every client, by client number; clients that share ranks share it."""
        return tuple(client.gateway for client in self.clients)

    @cached_property
    def participants(self) -> tuple[int, ...]:
        """Return the world ranks in the exchange, ascending: all gateways and the server's first rank."""
        return tuple(sorted({*self.gateways, *self.server[:1]}))

    @cached_property
    def contributors(self) -> tuple[int, ...]:
        """Return the participants without the server, which adds nothing: a sum hides their values only."""
        return tuple(sorted({*self.gateways}))

    @property
    def workers(self) -> tuple[int, ...]:
        """Return the world ranks that carry clients or belong to the server, ascending."""
        return tuple(place.world_rank for place in self.ranks if place.cluster is not None)

    def placement(self, world_rank: int) -> RankPlacement:
        """Return host, cluster and clients of a world rank."""
        return self.ranks[world_rank]

    def worlds(self, pipeline: str) -> dict[str, tuple[int, ...]]:
        """Return the ranks of each torch world by its name in messages.

        A world is a cluster, or a client where each client's ranks form a pipeline.

        Args:
            pipeline: value of engine.pipeline.
        """
        if pipeline == "client":
            return {f"client {client.client}": client.ranks for client in self.clients}
        return {f"cluster {cluster.name}": cluster.ranks for cluster in self.clusters}

    def world_of(self, world_rank: int, pipeline: str) -> tuple[int, ...]:
        """Return the ranks of the torch world of a rank that has work.

        Args:
            pipeline: as for `worlds`; a server has no pipeline.
        """
        return next(ranks for ranks in self.worlds(pipeline).values() if world_rank in ranks)

    def cluster_of(self, name: str) -> ClusterPlacement:
        """Return the cluster of that name.

        Raises:
            KeyError: there is none, as for the None of an idle rank.
        """
        for cluster in self.clusters:
            if cluster.name == name:
                return cluster
        raise KeyError(name)


def place_clients(
    hosts: Sequence[Host], clients: int, ranks_per_client: int | Literal["auto"], *, server: bool = False
) -> Topology:
    """Place clients on the slots of hosts.

    Slots are divided into groups of consecutive ranks, and the groups are used in file order:

    - `auto`, at most as many clients as hosts: a group is a whole host, of whatever size;
    - `auto`, more clients than hosts: all groups have the largest size that still leaves one for each client;
    - a number R: all groups have R ranks, each of one host; hosts with fewer slots stay idle;
    - a number R above the slots of the largest host: a group is several consecutive hosts of one cluster with
      R slots together;
    - more clients than groups: the groups carry contiguous blocks of clients whose sizes differ by at most
      one.

    Args:
        hosts: in the order of their ranks.
        clients: their number, at least 1.
        ranks_per_client: `auto` or a whole number of at least 1.
        server: whether the method has a server. The host with role=server carries no clients; if the method
            has no server, it stays idle.

    Raises:
        ConfigError: there is no client, no host for clients, no server where there must be one, or the hosts
            do not offer the number of ranks.
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
            "hostfile, of a host that carries no clients, or start `python launch.py` on one machine without "
            "a hostfile or another launcher, which starts one more rank for it"
        )
    groups = _groups(hosts, clients, ranks_per_client)
    used = groups[:clients]
    blocks = _even_blocks(clients, len(used))
    groups_of_clients = [(host, ranks, block) for (host, ranks), block in zip(used, blocks, strict=True)]
    return _assemble(hosts, groups_of_clients, server)


def topology_of(config: RunConfig, hosts: Sequence[Host]) -> Topology:
    """Place a run's clients, and the server of its method if it has one, on hosts. Raises as
    `place_clients`.
    """
    return place_clients(
        hosts, config.data.clients, config.cluster.ranks_per_client, server=config.has_server
    )


def warnings(topology: Topology) -> list[str]:
    """Return a warning about each part of the hosts' capacity that stays idle."""
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
        count = sum(len(idle_by_host[host]) for host in whole)
        messages.append(
            f"{_counted(len(whole), 'host')} with {_counted(count, 'rank')} idle ({', '.join(whole)}): the "
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


def _groups(
    hosts: Sequence[Host], clients: int, ranks_per_client: int | Literal["auto"]
) -> list[tuple[Host, range]]:
    """Return groups of world ranks in file order, at least one; those beyond the number of clients
    stay idle.
    """
    if ranks_per_client == "auto":
        return _split_hosts(hosts, _auto_size([host for host in hosts if host.role == "client"], clients))
    size = ranks_per_client
    largest = max((host for host in hosts if host.role == "client"), key=lambda host: host.slots)
    if size > largest.slots:
        if groups := _join_hosts(hosts, size):
            return groups
        raise ConfigError(
            f"cluster.ranks_per_client={size}: the largest host ({largest.name}) has slots={largest.slots}, "
            f"and no neighbours of one cluster have {size} together; ask for at most {largest.slots} or "
            "what whole hosts have, or raise slots in the hostfile"
        )
    groups = _split_hosts(hosts, size)
    for host in dict.fromkeys(host for host, _ in groups[:clients]):
        if rest := host.slots % size:
            divisors = [str(number) for number in range(1, host.slots + 1) if host.slots % number == 0]
            raise ConfigError(
                f"cluster.ranks_per_client={size}: leaves {rest} of the {host.slots} slots of {host.name} "
                f"unused; ask for {' or '.join(divisors)}, or write slots={host.slots - rest} for "
                f"{host.name}"
            )
    return groups


def _auto_size(hosts: Sequence[Host], clients: int) -> int | None:
    """Return the size of groups for `auto`; None: whole hosts."""
    if clients <= len(hosts):
        return None
    for size in range(max(host.slots for host in hosts), 1, -1):
        if sum(host.slots // size for host in hosts) >= clients:
            return size
    return 1


def _split_hosts(hosts: Sequence[Host], size: int | None) -> list[tuple[Host, range]]:
    """Return the ranks of each host that carries clients, in groups of `size` (None: one group per host).

    Ranks that do not fill a group belong to none.
    """
    groups = []
    start = 0
    for host in hosts:
        step = size or host.slots
        if host.role == "client":
            last = start + host.slots - step
            groups += [(host, range(first, first + step)) for first in range(start, last + 1, step)]
        start += host.slots
    return groups


def _join_hosts(hosts: Sequence[Host], size: int) -> list[tuple[Host, range]]:
    """Return groups of consecutive hosts of one cluster with exactly `size` slots, each with its first host.

    Hosts that do not fill a group belong to none.
    """
    groups = []
    open_group: list[tuple[Host, int]] = []  # each host with its first rank
    end = 0
    for host in hosts:
        if host.role == "server" or (open_group and open_group[0][0].cluster != host.cluster):
            open_group = []
        start = end
        end += host.slots
        if host.role == "server":
            continue
        open_group.append((host, start))
        while end - open_group[0][1] > size:
            open_group.pop(0)
        if end - open_group[0][1] == size:
            groups.append((open_group[0][0], range(open_group[0][1], end)))
            open_group = []
    return groups


def _even_blocks(clients: int, groups: int) -> list[range]:
    """Return contiguous blocks of client numbers. The first groups, on the faster hosts, take the surplus."""
    size, surplus = divmod(clients, groups)
    blocks = []
    start = 0
    for group in range(groups):
        stop = start + size + (group < surplus)
        blocks.append(range(start, stop))
        start = stop
    return blocks


def _assemble(hosts: Sequence[Host], groups: list[tuple[Host, range, range]], server: bool) -> Topology:
    """Return the topology of (host, ranks, clients) groups; the other ranks are idle or the server's."""
    cluster_ranks: dict[str, list[int]] = {}
    cluster_clients: dict[str, list[int]] = {}
    clients_of: dict[int, tuple[int, ...]] = {}
    clients: list[ClientPlacement] = []
    for host, ranks, block in groups:
        cluster_ranks.setdefault(host.cluster, []).extend(ranks)
        cluster_clients.setdefault(host.cluster, []).extend(block)
        clients_of.update(dict.fromkeys(ranks, tuple(block)))
        clients += [ClientPlacement(client, host.cluster, tuple(ranks), ranks[0]) for client in block]
    slots = [(host, local_rank) for host in hosts for local_rank in range(host.slots)]
    places = []
    for world_rank, (host, local_rank) in enumerate(slots):
        cluster = None
        cluster_rank = None
        if world_rank in clients_of:
            cluster = host.cluster
            cluster_rank = cluster_ranks[cluster].index(world_rank)
        elif server and host.role == "server":
            cluster = SERVER
            cluster_rank = local_rank
        places.append(
            RankPlacement(
                world_rank=world_rank,
                host=host.name,
                local_rank=local_rank,
                cluster=cluster,
                cluster_rank=cluster_rank,
                clients=clients_of.get(world_rank, ()),
            )
        )
    serving = tuple(place.world_rank for place in places if place.cluster == SERVER)
    clusters = [
        ClusterPlacement(name, tuple(ranks), tuple(cluster_clients[name]))
        for name, ranks in cluster_ranks.items()
    ]
    if serving:
        clusters.append(ClusterPlacement(SERVER, serving, ()))
    idle = tuple(place.world_rank for place in places if place.cluster is None)
    return Topology(
        ranks=tuple(places),
        clients=tuple(clients),
        clusters=tuple(clusters),
        idle=idle,
        server=serving,
        spare=tuple(rank for rank in idle if slots[rank][0].role == "server"),
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
