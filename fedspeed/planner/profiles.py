"""The profiles of a topology's ranks: the node of each and what it shares with other ranks. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedspeed.cluster.topology import Topology
from fedspeed.planner.hardware import Node
from fedspeed.planner.plan import RankProfile

Profiles = Mapping[str, Sequence[RankProfile]]  # by cluster


def profiles_of(topology: Topology, nodes: Mapping[str, Node]) -> dict[str, list[RankProfile]]:
    """Return the distinct profiles of each cluster's training ranks.

    Ranks on nodes that differ by name only have equal profiles, which are listed once.
    """
    by_cluster: dict[str, list[RankProfile]] = {}
    for rank in topology.ranks:
        if rank.cluster is None or not rank.clients:
            continue
        profile = profile_of(topology, nodes, rank.world_rank)
        known = by_cluster.setdefault(rank.cluster, [])
        if profile not in known:
            known.append(profile)
    return by_cluster


def profile_of(topology: Topology, nodes: Mapping[str, Node], world_rank: int) -> RankProfile:
    """Return the profile of a rank that trains."""
    hosts = {rank.world_rank: rank.host for rank in topology.ranks}
    rank = topology.placement(world_rank)
    assert rank.cluster is not None, f"rank {world_rank} is idle"
    cluster = topology.cluster_of(rank.cluster)
    client_ranks = topology.clients[rank.clients[0]].ranks
    return RankProfile(
        replace(nodes[rank.host], name="", assumed=()),
        ranks_here=sum(other.host == rank.host for other in topology.ranks if other.clients),
        client_ranks=len(client_ranks),
        cluster_ranks=len(cluster.ranks),
        cluster_nodes=len({hosts[r] for r in cluster.ranks}),
        carried=len(rank.clients),
        participants=len(topology.participants),
        participants_here=sum(hosts[gateway] == rank.host for gateway in topology.participants),
        client_nodes=len({hosts[r] for r in client_ranks}),
    )
