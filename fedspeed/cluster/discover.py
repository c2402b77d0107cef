"""Finding out how this process was started: by which launcher, as which rank, over which hosts, and where
rank 0 can be met.

`discover` decides and is pure but for reading hostfiles; `from_process` collects its inputs. No torch, no
MPI: only the environment and the command lines of the ancestors.
"""

import hashlib
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedspeed.cluster import layout, nodelist
from fedspeed.cluster.hostfile import Host, Hostfile, read
from fedspeed.cluster.ranks import ALONE, RankIdentity, identify
from fedspeed.errors import HostfileError
from fedspeed.net.ports import PORTS

Kind = Literal["deepspeed", "openmpi", "slurm", "mpi", "torchrun", "local", "none"]

# Names a file to the ranks of the local supervisor; see `Launch.meeting`.
MEETING_VARIABLE = "FEDSPEED_MEETING"
_DEFAULT_PORT = 29500
_MAX_ANCESTORS = 64


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    `kind` is the nearest launcher: `deepspeed` (its own per-host launcher: pdsh and single-host), `openmpi`
    (mpirun, also `deepspeed --launcher openmpi`, also inside Slurm or PBS jobs), `slurm` (srun), `mpi` (other
    MPIs), `torchrun` (or whoever sets torch's variables), `local` (started by fedspeed.cluster.local) and
    `none`: a plain `python launch.py`, which is no rank yet.

    `hosts` carry exactly `world_size` slots, ranks numbered host by host, except for kind `none`: there they
    are the named hostfile's, or this machine with one slot. `hostfile` is the file the facts come from.
    `local_rank` counts the processes on this machine and is the
    index of the accelerator. `meeting`: the file in which rank 0 of a local run says at which port it
        listens; None: everybody knows by
    `master_port`.
    """

    kind: Kind
    world_rank: int
    world_size: int
    local_rank: int
    hostfile: Hostfile | None
    hosts: tuple[Host, ...]
    master_addr: str
    master_port: int
    meeting: Path | None = None


def discover(
    env: Mapping[str, str],
    cmdlines: Sequence[Sequence[str]],
    hostfile_arg: Path | None,
    cwd: Path,
    hostname: str,
) -> Launch:
    """Decides how this process was started.

    Args:
        env: the environment.
        cmdlines: command lines of the ancestors, the parent's first.
        hostfile_arg: what `--hostfile` named, relative to `cwd`.
        hostname: this machine's name.

    Raises:
        HostfileError: the launcher's variables are incomplete, or the hosts cannot be told, or sources
            contradict each other.
    """
    world_info = layout.world_info_of(cmdlines)
    identity = identify(env, world_info is not None)
    named = layout.named_hostfile(hostfile_arg, env, cwd)
    if identity.kind == "none":
        return _alone(env, named)
    hostfile, hosts = layout.find(
        layout.Clues(identity, env, cmdlines, named=named, cwd=cwd, hostname=hostname), world_info
    )
    one_machine = identity.all_local or len(hosts) == 1
    master_addr = env.get("MASTER_ADDR") or ("127.0.0.1" if one_machine else hosts[0].name)
    meeting = Path(env[MEETING_VARIABLE]) if identity.kind == "local" and MEETING_VARIABLE in env else None
    return Launch(
        identity.kind,
        identity.world_rank,
        identity.world_size,
        local_rank=identity.local_rank,
        hostfile=hostfile,
        hosts=hosts,
        master_addr=master_addr,
        master_port=0 if meeting else _master_port(env, identity),
        meeting=meeting,
    )


def from_process(hostfile_arg: Path | None) -> Launch:
    """`discover` for this very process."""
    return discover(os.environ, ancestor_cmdlines(), hostfile_arg, Path.cwd(), socket.gethostname())


def current_rank_identity() -> RankIdentity:
    """Which rank this process is; one that stands alone where that cannot be told."""
    try:
        return identify(os.environ, layout.world_info_of(ancestor_cmdlines()) is not None)
    except HostfileError:
        return ALONE


def mpi_is_fault_tolerant() -> bool:
    """Whether mpirun was told to leave a job's ranks alone when one of them dies (`--with-ft mpi`), which it
    tells them so.
    """
    return os.environ.get("OMPI_MCA_mpi_ft_enable", "").lower() in ("1", "true", "yes")


def ancestor_cmdlines() -> list[list[str]]:
    """Command lines of parent, grandparent and so on, as far as /proc shows them; empty where there is no
    /proc.
    """
    cmdlines = []
    pid = os.getppid()
    while pid > 1 and len(cmdlines) < _MAX_ANCESTORS:
        folder = Path("/proc") / str(pid)
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")[:-1]
            # The command's name may contain blanks and parentheses; the parent's pid stands second behind the
            # last one.
            pid = int(
                (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]
            )
        except (OSError, ValueError, IndexError):
            break
        cmdlines.append([os.fsdecode(word) for word in words])
    return cmdlines


def _alone(env: Mapping[str, str], named: Path | None) -> Launch:
    """A plain `python launch.py`. On one machine it may start local ranks; in a job of several hosts that
    would leave the others unused.
    """
    nodes = env.get("SLURM_JOB_NUM_NODES", "1")
    if "SLURM_JOB_ID" in env and nodes.isdecimal() and int(nodes) > 1:
        raise HostfileError(
            f"this process stands alone in Slurm job {env['SLURM_JOB_ID']} of {nodes} nodes "
            f"({env.get('SLURM_JOB_NODELIST', '?')}); start the ranks with `srun python launch.py ...` or "
            "`mpirun python launch.py ...` (launchers/slurm.sbatch does), or ask for one node"
        )
    if "PBS_JOBID" in env and (nodefile := Path(env.get("PBS_NODEFILE", ""))).is_file():
        nodes = nodelist.count_lines(nodefile.read_text(encoding="utf-8"))
        if len(nodes) > 1:
            raise HostfileError(
                f"this process stands alone in PBS job {env['PBS_JOBID']} of {len(nodes)} nodes "
                f"({', '.join(nodes)}); "
                "start the ranks with `mpirun python launch.py ...` (launchers/pbs.sh does), or ask for one "
                "node"
            )
    hostfile = read(named) if named else None
    hosts = hostfile.hosts if hostfile else (Host("localhost", 1),)
    return Launch(
        "none", 0, 1, local_rank=0, hostfile=hostfile, hosts=hosts, master_addr="127.0.0.1", master_port=0
    )


def _master_port(env: Mapping[str, str], identity: RankIdentity) -> int:
    """MASTER_PORT, else a port that all ranks of a job derive alike from its id, so that jobs on one machine
    do not collide.
    """
    given = env.get("MASTER_PORT")
    if given:
        # One above is the rendezvous' own, so 65535 has no room.
        if not (given.isascii() and given.isdecimal() and 0 < int(given) < 65535):
            raise HostfileError(
                f"MASTER_PORT={given!r} is not a port between 1 and 65534; correct or unset it"
            )
        return int(given)
    job = _job_id(env, identity)
    if job is None:
        return _DEFAULT_PORT
    return PORTS[int.from_bytes(hashlib.sha256(job.encode()).digest()[:8], "big") % len(PORTS)]


def _job_id(env: Mapping[str, str], identity: RankIdentity) -> str | None:
    """The most specific id that is equal on all ranks: two starts in one batch job may run at the same
    time.
    """
    if identity.kind == "openmpi" and "PMIX_NAMESPACE" in env:
        return env["PMIX_NAMESPACE"]
    if identity.kind == "slurm":
        # Only under srun: mpirun's daemons on other hosts stand in a step of their own, the head node's ranks
        # in none.
        return f"{env.get('SLURM_JOB_ID')}.{env['SLURM_STEP_ID']}"
    return env.get("SLURM_JOB_ID") or env.get("PBS_JOBID")
