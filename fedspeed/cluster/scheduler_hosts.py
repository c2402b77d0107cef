"""The hosts of a job as Slurm or PBS names them in the environment."""

from pathlib import Path

from fedspeed.cluster import nodelist
from fedspeed.cluster.hostfile import Host
from fedspeed.cluster.hostnames import find_host
from fedspeed.cluster.launch_context import LaunchContext, contradiction, fill_slots
from fedspeed.errors import HostfileError


def scheduler_hosts(context: LaunchContext) -> tuple[Host, ...] | None:
    """Return the hosts of a Slurm step, Slurm job or PBS job; None outside of one, or where none fits the
    ranks.

    Raises:
        HostfileError: Slurm's description of a step does not fit this rank.
    """
    env = context.env
    if context.identity.kind == "slurm":
        return _step_hosts(context)
    if "SLURM_JOB_NODELIST" in env:
        candidates = _slurm_job_candidates(nodelist.expand_hosts(env["SLURM_JOB_NODELIST"]), context)
    elif "PBS_NODEFILE" in env and (nodefile := Path(env["PBS_NODEFILE"])).is_file():
        counts = nodelist.count_lines(nodefile.read_text(encoding="utf-8"))
        candidates = [tuple(Host(name, slots) for name, slots in counts.items())]
    else:
        return None
    for candidate in candidates:
        hosts = fill_slots(candidate, context.identity.world_size)
        if hosts and not contradiction(hosts, context):
            return hosts
    return None


def _step_hosts(context: LaunchContext) -> tuple[Host, ...]:
    """Return the hosts of the step that srun started."""
    names = nodelist.expand_hosts(context.env.get("SLURM_STEP_NODELIST", ""))
    counts = context.env.get("SLURM_STEP_TASKS_PER_NODE", "")
    hosts = _pair(names, nodelist.expand_counts(counts))
    if hosts:
        problem = contradiction(hosts, context)
    else:
        problem = f"{len(names)} hosts, but SLURM_STEP_TASKS_PER_NODE={counts}"
    if hosts is None or problem:
        raise HostfileError(
            f"Slurm's step on {context.env.get('SLURM_STEP_NODELIST')}: {problem}; start with `srun "
            "--distribution=block`, or pass --hostfile"
        )
    return hosts


def _slurm_job_candidates(names: list[str], context: LaunchContext) -> list[tuple[Host, ...]]:
    """Return what mpirun or torchrun inside a Slurm job may run on, the most likely first.

    On the head node SLURM_TASKS_PER_NODE describes the job. On other nodes it describes the step that started
    mpirun's daemon. There all hosts are assumed to have equal slots, computed from this machine's first rank
    and its position in the node list.
    """
    identity = context.identity
    env = context.env
    candidates = []
    if "SLURM_STEP_ID" not in env and "SLURM_TASKS_PER_NODE" in env:
        candidates.append(_pair(names, nodelist.expand_counts(env["SLURM_TASKS_PER_NODE"])))
    here = find_host([Host(name, 1) for name in names], context.hostname)
    if here and identity.local_size is not None:
        index = names.index(here.name)
        first_rank = identity.world_rank - identity.local_rank
        slots = first_rank // index if index else identity.local_size
        if slots >= 1:
            candidates.append(_pair(names, [slots] * len(names)))
    return [candidate for candidate in candidates if candidate]


def _pair(names: list[str], slots: list[int]) -> tuple[Host, ...] | None:
    """Return hosts of these names and slots; None where there are more of the one than of the other."""
    if len(names) != len(slots):
        return None
    return tuple(Host(name, count) for name, count in zip(names, slots, strict=True))
