"""Checks of a run's placement on hosts, before anything is started."""

import os
import socket
from pathlib import Path

from fedspeed.cluster.devices import computing_gpus
from fedspeed.cluster.discover import Launch, from_process
from fedspeed.cluster.gpus import check_gpus, gpus_of_ranks
from fedspeed.cluster.local_ranks import check_rank_count, local_hosts, oversubscription_notes
from fedspeed.cluster.topology import Topology, topology_of
from fedspeed.config.run import RunConfig
from fedspeed.errors import ConfigError


def check_layout(config: RunConfig, hostfile: Path | None) -> tuple[Topology, Launch, list[str]]:
    """Place the clients on the ranks that this command would have.

    Returns:
        the topology, how the command was started, and notes on ranks that would share a core or a GPU.

    Raises:
        ConfigError: the ranks, clusters or cards do not fit the configuration.
    """
    launch = from_process(hostfile)
    starts_ranks = launch.kind == "none"
    hosts = launch.hosts
    if starts_ranks:
        hosts = local_hosts(launch, config.cluster.local_ranks, config.data.clients, server=config.has_server)
    ranks = sum(host.slots for host in hosts)
    if starts_ranks and launch.hostfile:
        check_rank_count(ranks, launch.hostfile.path)
    if starts_ranks and config.routing.started_by_mpi and ranks > 1:
        raise ConfigError(
            f"routing.transport={config.routing.transport}: plain python starts its ranks without MPI; "
            "start with `mpirun -n N python launch.py ...`, or set routing.transport=gloo"
        )
    topology = topology_of(config, hosts)
    check_clusters(config, topology)
    return topology, launch, _sharing_notes(config, topology) if starts_ranks else []


def check_clusters(config: RunConfig, topology: Topology) -> None:
    """Check that clusters named in the configuration exist.

    Raises:
        ConfigError: train.local_steps_by_cluster names a cluster without clients.
    """
    names = [cluster.name for cluster in topology.clusters if cluster.clients]
    for name in config.train.local_steps_by_cluster:
        if name not in names:
            raise ConfigError(
                f"train.local_steps_by_cluster: no cluster {name} takes part; there "
                f"{'are' if len(names) > 1 else 'is'} {', '.join(names)}"
            )


def _sharing_notes(config: RunConfig, topology: Topology) -> list[str]:
    """Return notes on ranks of this machine that would share a core or a GPU.

    Raises:
        ConfigError: two ranks of one torch world would share a GPU.
    """
    ranks = len(topology.ranks)
    gpus = computing_gpus(os.environ)
    if not gpus:
        return oversubscription_notes(ranks - len(topology.server))
    return check_gpus(
        topology.worlds(config.engine.pipeline), gpus_of_ranks(ranks, gpus, socket.gethostname())
    )
