"""How this process was started: by which launcher, as which rank, over which hosts, and where rank 0 listens.

`discover` decides and is pure but for reading hostfiles; `from_process` collects its inputs: the environment
and the command lines of the ancestor processes. Neither needs torch or MPI.
"""

import hashlib
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedspeed.cluster import nodelist
from fedspeed.cluster.hostfile import Host, Hostfile, read
from fedspeed.cluster.hostfile_search import requested_hostfile
from fedspeed.cluster.launch_context import LaunchContext
from fedspeed.cluster.launcher_arguments import world_info_of
from fedspeed.cluster.layout import find_layout
from fedspeed.cluster.ranks import NOT_LAUNCHED, LauncherKind, RankIdentity, identify
from fedspeed.errors import HostfileError
from fedspeed.net.ports import PORTS

# Holds, for the ranks of the local supervisor, the path of `Launch.port_file`.
PORT_FILE_VARIABLE = "FEDSPEED_MEETING"
_DEFAULT_PORT = 29500
_MAX_ANCESTORS = 64


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
        kind: the nearest launcher: `deepspeed` (its per-host launcher: pdsh and single-host), `openmpi`
            (mpirun, also `deepspeed --launcher openmpi`, also inside Slurm or PBS jobs), `slurm` (srun),
            `mpi` (other MPIs), `torchrun` (or whoever sets torch's variables), `local` (started by
            fedspeed.cluster.local), or `none`: a plain `python launch.py`, which is not a rank yet.
        world_rank, world_size: this rank and the number of ranks.
        local_rank: counts the ranks of this machine from 0, and is the index of the accelerator.
        hostfile: states the facts of the hosts, if there is one.
        hosts: with `world_size` slots in all, ranks being numbered host by host. For kind `none` they are
            those of the requested hostfile, or this machine with one slot.
        master_addr, master_port: address of rank 0.
        port_file: the file in which rank 0 of a local run writes the port at which it listens. None: all
            ranks know `master_port`.
        one_machine: whether all ranks run on this machine, by what the launcher says.
    """

    kind: LauncherKind
    world_rank: int
    world_size: int
    local_rank: int
    hostfile: Hostfile | None
    hosts: tuple[Host, ...]
    master_addr: str
    master_port: int
    port_file: Path | None = None
    one_machine: bool = False


def discover(
    env: Mapping[str, str],
    cmdlines: Sequence[Sequence[str]],
    hostfile_arg: Path | None,
    cwd: Path,
    hostname: str,
) -> Launch:
    """Return how a process was started.

    Args:
        env: its environment variables.
        cmdlines: command lines of its ancestors, the parent's first.
        hostfile_arg: value of `--hostfile`, relative to `cwd`.
        cwd: its working folder.
        hostname: name of its machine.

    Raises:
        HostfileError: the launcher's variables are incomplete, the hosts cannot be determined, or sources
            contradict each other.
    """
    world_info = world_info_of(cmdlines)
    identity = identify(env, world_info is not None)
    hostfile_path = requested_hostfile(hostfile_arg, env, cwd)
    if identity.kind == "none":
        return _plain_launch(env, hostfile_path)
    context = LaunchContext(
        identity=identity,
        env=env,
        cmdlines=cmdlines,
        requested_hostfile=hostfile_path,
        cwd=cwd,
        hostname=hostname,
    )
    hostfile, hosts = find_layout(context, world_info)
    one_machine = identity.all_local or (len(hosts) == 1 and identity.local_size is None)
    port_file = None
    if identity.kind == "local" and PORT_FILE_VARIABLE in env:
        port_file = Path(env[PORT_FILE_VARIABLE])
    return Launch(
        kind=identity.kind,
        world_rank=identity.world_rank,
        world_size=identity.world_size,
        local_rank=identity.local_rank,
        hostfile=hostfile,
        hosts=hosts,
        master_addr=env.get("MASTER_ADDR") or ("127.0.0.1" if one_machine else hosts[0].name),
        master_port=0 if port_file else _master_port(env, identity),
        port_file=port_file,
        one_machine=one_machine,
    )


def from_process(hostfile_arg: Path | None) -> Launch:
    """Return how this very process was started. Raises as `discover` does."""
    return discover(os.environ, ancestor_cmdlines(), hostfile_arg, Path.cwd(), socket.gethostname())


def current_rank_identity() -> RankIdentity:
    """Return which rank this process is; `NOT_LAUNCHED` where the launcher's variables are incomplete."""
    try:
        return identify(os.environ, world_info_of(ancestor_cmdlines()) is not None)
    except HostfileError:
        return NOT_LAUNCHED


def mpi_is_fault_tolerant() -> bool:
    """Return whether mpirun leaves the other ranks running when one dies (`mpirun --with-ft mpi`)."""
    return os.environ.get("OMPI_MCA_mpi_ft_enable", "").lower() in ("1", "true", "yes")


def ancestor_cmdlines() -> list[list[str]]:
    """Return the command lines of parent, grandparent and so on, as far as /proc shows them."""
    cmdlines: list[list[str]] = []
    pid = os.getppid()
    while pid > 1 and len(cmdlines) < _MAX_ANCESTORS:
        folder = Path("/proc") / str(pid)
        try:
            arguments = (folder / "cmdline").read_bytes().split(b"\0")[:-1]
            status = (folder / "stat").read_text(encoding="utf-8", errors="replace")
            # The parent's pid is the second field after the command's name, which is in parentheses and may
            # contain blanks and parentheses itself.
            pid = int(status.rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            break
        cmdlines.append([os.fsdecode(argument) for argument in arguments])
    return cmdlines


def _plain_launch(env: Mapping[str, str], hostfile_path: Path | None) -> Launch:
    """Return the launch of a plain `python launch.py`, which may start the ranks of one machine.

    Raises:
        HostfileError: it runs in a job of several hosts, of which it would leave all but one unused.
    """
    nodes = env.get("SLURM_JOB_NUM_NODES", "1")
    if "SLURM_JOB_ID" in env and nodes.isdecimal() and int(nodes) > 1:
        raise HostfileError(
            f"this process stands alone in Slurm job {env['SLURM_JOB_ID']} of {nodes} nodes "
            f"({env.get('SLURM_JOB_NODELIST', '?')}); start the ranks with `srun python launch.py ...` or "
            "`mpirun python launch.py ...` (launchers/slurm.sbatch does), or ask for one node"
        )
    if "PBS_JOBID" in env and (nodefile := Path(env.get("PBS_NODEFILE", ""))).is_file():
        names = nodelist.count_lines(nodefile.read_text(encoding="utf-8"))
        if len(names) > 1:
            raise HostfileError(
                f"this process stands alone in PBS job {env['PBS_JOBID']} of {len(names)} nodes "
                f"({', '.join(names)}); start the ranks with `mpirun python launch.py ...` "
                "(launchers/pbs.sh does), or ask for one node"
            )
    hostfile = read(hostfile_path) if hostfile_path else None
    return Launch(
        kind="none",
        world_rank=0,
        world_size=1,
        local_rank=0,
        hostfile=hostfile,
        hosts=hostfile.hosts if hostfile else (Host("localhost", 1),),
        master_addr="127.0.0.1",
        master_port=0,
        one_machine=True,
    )


def _master_port(env: Mapping[str, str], identity: RankIdentity) -> int:
    """Return MASTER_PORT, else a port derived from the job's id.

    All ranks derive the same port, and two jobs on one machine do not collide.
    """
    text = env.get("MASTER_PORT")
    if text:
        # The rendezvous listens one port above, so 65535 is refused.
        if not (text.isascii() and text.isdecimal() and 0 < int(text) < 65535):
            raise HostfileError(
                f"MASTER_PORT={text!r} is not a port between 1 and 65534; correct or unset it"
            )
        return int(text)
    job = _job_id(env, identity)
    if job is None:
        return _DEFAULT_PORT
    return PORTS[int.from_bytes(hashlib.sha256(job.encode()).digest()[:8], "big") % len(PORTS)]


def _job_id(env: Mapping[str, str], identity: RankIdentity) -> str | None:
    """Return the most specific id that is equal on all ranks, since two starts in a job may run at once."""
    if identity.kind == "openmpi" and "PMIX_NAMESPACE" in env:
        return env["PMIX_NAMESPACE"]
    if identity.kind == "slurm":
        # Under mpirun the step's id differs among ranks: its daemons on other hosts are a Slurm step, the
        # ranks on the head node belong to none.
        return f"{env.get('SLURM_JOB_ID')}.{env['SLURM_STEP_ID']}"
    return env.get("SLURM_JOB_ID") or env.get("PBS_JOBID")
