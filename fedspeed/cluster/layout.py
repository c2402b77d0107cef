"""Which hosts, with how many slots, carry the ranks of this job.

No launcher tells its ranks which hostfile it was given. DeepSpeed's per-host launcher carries the resolved
hosts on its own command line, mpirun the file's path (on the host where it was started), and schedulers name
hosts in the environment. A hostfile is accepted only if it does not contradict what this rank knows of
itself; `rendezvous.meet` then compares the results of all ranks.
"""

from pathlib import Path

from fedspeed.cluster.hostfile import Host, Hostfile, read
from fedspeed.cluster.hostfile_search import (
    HOSTFILE_VARIABLE,
    Layout,
    add_facts,
    hosts_text,
    only_layout,
    readable_hostfiles,
    searched_text,
    select_hosts,
)
from fedspeed.cluster.hostnames import is_same_host
from fedspeed.cluster.launch_context import LaunchContext, contradiction, fill_slots, host_of_rank
from fedspeed.cluster.launcher_arguments import hostfile_argument
from fedspeed.cluster.scheduler_hosts import scheduler_hosts
from fedspeed.errors import HostfileError

# Tells the ranks of the local supervisor how many of them, the last ones, are the method's server.
SERVER_RANKS_VARIABLE = "FEDSPEED_SERVER_RANKS"


def find_layout(context: LaunchContext, world_info: dict[str, int] | None) -> Layout:
    """Return the job's hosts in the order of their ranks, and the hostfile that states their facts, if any.

    Args:
        world_info: host -> number of ranks from DeepSpeed's launcher; None under other launchers.

    Raises:
        HostfileError: no source names the hosts, two sources disagree, or the requested file does not fit.
    """
    identity = context.identity
    if identity.kind == "deepspeed":
        assert world_info is not None, "a rank counts as DeepSpeed's only if the world info was found"
        return _deepspeed_layout(context, world_info)
    if context.requested_hostfile:
        return _requested_layout(read(context.requested_hostfile), identity.world_size)
    if identity.kind == "local":
        servers = int(context.env.get(SERVER_RANKS_VARIABLE, "0"))  # as the supervisor has set it
        return None, this_machine(identity.world_size - servers, servers)
    if layout := _mpirun_layout(context):
        return layout
    if identity.all_local:
        return add_facts((Host(context.hostname, identity.world_size),), context.cwd)
    if hosts := scheduler_hosts(context):
        return add_facts(hosts, context.cwd)
    return _searched_layout(context)


def this_machine(ranks: int, servers: int) -> tuple[Host, ...]:
    """Return the hosts of a run on one machine without a hostfile. A server has the last ranks, as a host of
    its own by the same name.

    Args:
        ranks: number of ranks for clients. servers: number of ranks of the method's server.
    """
    clients = Host("localhost", ranks)
    return (clients, Host("localhost", servers, role="server")) if servers else (clients,)


def _deepspeed_layout(context: LaunchContext, slots_by_host: dict[str, int]) -> Layout:
    """Return the layout under DeepSpeed's per-host launcher, which names hosts and slots."""
    world_size = context.identity.world_size
    world = ", ".join(f"{host} slots={slots}" for host, slots in slots_by_host.items())
    if sum(slots_by_host.values()) != world_size:
        raise HostfileError(
            f"the DeepSpeed launcher started {sum(slots_by_host.values())} ranks ({world}), but "
            f"WORLD_SIZE={world_size}; do not set WORLD_SIZE by hand"
        )
    path = context.requested_hostfile or _launcher_hostfile(context)
    if path:
        return _checked_deepspeed_file(read(path), slots_by_host, world_size)
    if list(slots_by_host) == ["localhost"]:
        return None, (Host("localhost", slots_by_host["localhost"]),)
    files, broken = readable_hostfiles(context.cwd)
    fitting = [(file, hosts) for file in files if (hosts := select_hosts(file, slots_by_host))]
    equal = [(f, hosts) for f, hosts in fitting if len(f.hosts) == len(hosts) and f.slots == world_size]
    if layout := only_layout(equal or fitting):
        return layout
    if len(slots_by_host) == 1:
        return None, tuple(Host(host, slots) for host, slots in slots_by_host.items())
    raise HostfileError(
        f"DeepSpeed runs on {world}, but does not tell which hostfile that came from, and no file in "
        f"{context.cwd / 'hostfiles'} has these hosts and slots; add `--hostfile FILE` behind launch.py or "
        f"set {HOSTFILE_VARIABLE}{searched_text(files, broken)}"
    )


def _checked_deepspeed_file(file: Hostfile, slots_by_host: dict[str, int], world_size: int) -> Layout:
    """Return the hosts of a file that DeepSpeed or the user named.

    On one machine, a file of several hosts with as many slots is accepted: it emulates a cluster.
    """
    hosts = select_hosts(file, slots_by_host)
    if hosts is not None:
        return file, hosts
    if len(slots_by_host) == 1 and file.slots == world_size:
        return file, file.hosts
    world = ", ".join(f"{host} slots={slots}" for host, slots in slots_by_host.items())
    raise HostfileError(
        f"{file.path}: does not describe this job: DeepSpeed runs on {world}, the file has "
        f"{hosts_text(file.hosts)}; give both the same file"
    )


def _requested_layout(file: Hostfile, world_size: int) -> Layout:
    """Return the hosts of a file that the user named, whatever machines the ranks run on.

    Ten hosts may be emulated on one machine.
    """
    if file.slots != world_size:
        raise HostfileError(
            f"{file.path}: offers {file.slots} slots, but the launcher started {world_size} ranks; start "
            f"exactly {file.slots} (mpirun -n {file.slots}), or name a hostfile with {world_size} slots"
        )
    return file, file.hosts


def _mpirun_layout(context: LaunchContext) -> Layout | None:
    """Return the layout by the hostfile on mpirun's command line; None without one.

    Only ranks on the machine where mpirun was started see that command line.
    """
    path = _launcher_hostfile(context)
    if path is None or str(path) == context.env.get("PBS_NODEFILE"):
        return None
    file = read(path)
    identity = context.identity
    if identity.all_local and file.slots != identity.world_size:
        return None
    hosts = fill_slots(file.hosts, identity.world_size)
    if hosts is None:
        raise HostfileError(
            f"{file.path}: offers {file.slots} slots, but mpirun started {identity.world_size} ranks; start "
            f"at most {file.slots}, or raise the slots in the file"
        )
    if problem := contradiction(hosts, context):
        raise HostfileError(
            f"{file.path}: {problem}; let ranks be numbered host by host (mpirun --map-by slot)"
        )
    return file, hosts


def _searched_layout(context: LaunchContext) -> Layout:
    """Return the layout by a file in `hostfiles/`, for ranks on machines other than mpirun's own.

    All that such a rank can compare a file with is what it knows of itself.
    """
    identity = context.identity
    files, broken = readable_hostfiles(context.cwd)
    fitting = [
        (file, file.hosts)
        for file in files
        if file.slots == identity.world_size
        and not contradiction(file.hosts, context)
        and is_same_host(host_of_rank(file.hosts, identity.world_rank)[0].name, context.hostname)
    ]
    if layout := only_layout(fitting):
        return layout
    raise HostfileError(
        f"{identity.world_size} ranks run on several hosts (this is rank {identity.world_rank} on "
        f"{context.hostname}), and nothing tells which; add `--hostfile FILE` behind launch.py, with "
        f"{identity.world_size} slots in the order of the ranks, or set "
        f"{HOSTFILE_VARIABLE}{searched_text(files, broken)}"
    )


def _launcher_hostfile(context: LaunchContext) -> Path | None:
    """Return the hostfile that the launcher was given, relative to the working folder."""
    argument = hostfile_argument(context.identity.kind, context.cmdlines)
    return context.cwd / argument if argument else None
