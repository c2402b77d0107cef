"""Which kinds of ranks a layout has. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedspeed.cluster.topology import Topology
from fedspeed.planner.hardware import Node
from fedspeed.planner.plan import Place

Places = Mapping[str, Sequence[Place]]  # by cluster


def places_of(topology: Topology, nodes: Mapping[str, Node]) -> dict[str, list[Place]]:
    """The different kinds of ranks of each cluster. Nodes that differ by name only are one kind."""
    found: dict[str, list[Place]] = {}
    for rank in topology.ranks:
        if rank.clients and (place := place_of(topology, nodes, rank.world_rank)) not in found.setdefault(
            rank.cluster, []
        ):
            found[rank.cluster].append(place)
    return found


def place_of(topology: Topology, nodes: Mapping[str, Node], world_rank: int) -> Place:
    """Where a rank that works stands."""
    hosts = {place.world_rank: place.host for place in topology.ranks}
    rank = topology.placement(world_rank)
    cluster = topology.cluster_of(rank.cluster)
    ranks_here = sum(place.host == rank.host for place in topology.ranks if place.clients)
    gateways_here = sum(hosts[gateway] == rank.host for gateway in topology.participants)
    own = topology.clients[rank.clients[0]].ranks
    return Place(
        replace(nodes[rank.host], name="", assumed=()),
        ranks_here,
        len(own),
        cluster_ranks=len(cluster.ranks),
        cluster_nodes=len({hosts[r] for r in cluster.ranks}),
        carried=len(rank.clients),
        participants=len(topology.participants),
        participants_here=gateways_here,
        client_nodes=len({hosts[r] for r in own}),
    )
