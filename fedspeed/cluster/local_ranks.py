"""How many ranks `python launch.py` starts on one machine."""

import os
from typing import Literal

from fedspeed.cluster.devices import computing_gpus, usable_cores
from fedspeed.cluster.discover import Launch
from fedspeed.cluster.hostfile import Host
from fedspeed.cluster.layout import this_machine
from fedspeed.errors import ConfigError

# n threads make a step n to this power times faster. Measured from one to two threads on 4 M parameters:
# 0.87; with more threads it is lower.
_THREADS_SCALE = 0.75
MAX_RANKS_PER_CORE = 64


def local_rank_count(setting: int | Literal["auto"], clients: int, *, server: bool = False) -> int:
    """Return how many ranks to start for clients on this machine.

    Args:
        setting: cluster.local_ranks. `auto` means one rank per GPU, but the same number for every client if
            there are more GPUs than clients; without GPUs, what `ranks_on_cores` returns.
        clients: number of clients.
        server: whether a rank of the method's server starts beside them. Of several GPUs, `auto` leaves it
            the last one to itself.

    Raises:
        ConfigError: `check_rank_count` refuses the setting.
    """
    if setting == "auto":
        gpus = computing_gpus(os.environ)
        if server and gpus > 1:
            gpus -= 1
        if gpus > clients:
            return gpus - gpus % clients
        return gpus or ranks_on_cores(clients, usable_cores())
    check_rank_count(setting, f"cluster.local_ranks={setting}")
    return setting


def local_hosts(
    launch: Launch, setting: int | Literal["auto"], clients: int, *, server: bool
) -> tuple[Host, ...]:
    """Return the hosts of a run that plain python starts: the hostfile's, else this machine.

    Args:
        setting: cluster.local_ranks, as for `local_rank_count`.
        server: whether the method has a server. Without a hostfile, it is one more rank of this machine.

    Raises:
        ConfigError: as `local_rank_count` does.
    """
    if launch.hostfile:
        return launch.hosts
    return this_machine(local_rank_count(setting, clients, server=server), int(server))


def oversubscription_notes(ranks: int) -> list[str]:
    """Return a note if this machine, without a GPU, is to start more ranks than it has cores.

    For ranks on GPUs see `gpus.check_gpus`.
    """
    cores = usable_cores()
    if computing_gpus(os.environ) or ranks <= cores:
        return []
    return [
        f"{ranks} ranks on {cores} core{'s' if cores > 1 else ''}: they take turns, so that a round is not "
        f"shorter than with {cores}, and memory is needed {ranks} times; set cluster.local_ranks={cores} "
        "(or auto), or give the hostfile fewer slots"
    ]


def check_rank_count(ranks: int, source: str) -> None:
    """Check that this machine is not asked for so many ranks that it runs out of processes.

    Args:
        source: the setting or file that asks, as the message names it.

    Raises:
        ConfigError: more than `MAX_RANKS_PER_CORE` ranks per core.
    """
    most = MAX_RANKS_PER_CORE * usable_cores()
    if ranks > most:
        raise ConfigError(
            f"{source}: {ranks} ranks are too many for one machine of {usable_cores()} cores; ask for at "
            f"most {most}"
        )


def ranks_on_cores(clients: int, cores: int) -> int:
    """Return the number of ranks with the shortest round, if each trains its clients in turn.

    Every rank has an equal share of the cores. For example, with three clients on two cores, one rank is
    faster than two: of two ranks, one would be idle while the other trains the third client.
    """
    possible = range(1, min(clients, cores) + 1)
    return min(possible, key=lambda ranks: -(-clients // ranks) / (cores // ranks) ** _THREADS_SCALE)
