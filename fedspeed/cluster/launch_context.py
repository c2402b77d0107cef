"""What a rank knows about its launch, and whether a list of hosts agrees with that knowledge."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedspeed.cluster.hostfile import Host
from fedspeed.cluster.hostnames import find_host
from fedspeed.cluster.ranks import RankIdentity


@dataclass(frozen=True)
class LaunchContext:
    """Everything from which the hosts of a job may be derived.

    Attributes:
        identity: of this rank.
        env: the environment variables.
        cmdlines: command lines of the ancestor processes, the parent's first.
        requested_hostfile: the hostfile that the user named, if any.
        cwd: the working folder.
        hostname: name of this machine.
    """

    identity: RankIdentity
    env: Mapping[str, str]
    cmdlines: Sequence[Sequence[str]]
    requested_hostfile: Path | None
    cwd: Path
    hostname: str


def host_of_rank(hosts: Sequence[Host], world_rank: int) -> tuple[Host, int]:
    """Return the host of a world rank and the rank's slot on that host, ranks being numbered host by host.

    Raises:
        IndexError: the hosts have fewer slots.
    """
    for host in hosts:
        if world_rank < host.slots:
            return host, world_rank
        world_rank -= host.slots
    raise IndexError(world_rank)


def contradiction(hosts: Sequence[Host], context: LaunchContext) -> str | None:
    """Return why these hosts cannot be those of the job, judged by what this rank knows of itself; else None.

    Ranks that all run on one machine may be assigned to any hosts: that is how a cluster is emulated.
    """
    identity = context.identity
    if identity.all_local:
        return None
    host, slot = host_of_rank(hosts, identity.world_rank)
    actual = find_host(hosts, context.hostname)
    if actual and actual != host:
        return f"rank {identity.world_rank} runs on {actual.name}, but would belong to {host.name}"
    if identity.local_rank != slot or (identity.local_size is not None and identity.local_size != host.slots):
        return (
            f"rank {identity.world_rank} is local rank {identity.local_rank} of "
            f"{identity.local_size or '?'} on {context.hostname}, but would be number {slot} of "
            f"{host.slots} on {host.name}"
        )
    return None


def fill_slots(hosts: Sequence[Host], world_size: int) -> tuple[Host, ...] | None:
    """Return the hosts that `world_size` ranks occupy if slots are filled host by host, as mpirun does.

    The last host may have fewer slots than before. None: there are too few slots.
    """
    filled = []
    for host in hosts:
        if world_size:
            filled.append(replace(host, slots=min(host.slots, world_size)))
            world_size -= filled[-1].slots
    return None if world_size else tuple(filled)
