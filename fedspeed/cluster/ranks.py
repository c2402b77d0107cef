"""Which launcher started this process, and as which rank: read from environment variables alone.

Launchers nest, and each leaves its variables behind: a rank of `mpirun` inside an sbatch script sees Slurm's
variables of the script too, and on other hosts those of the step that started mpirun's daemon. The nearest
launcher must win, so variables are tried from the innermost launcher outwards: our own supervisor, torchrun,
DeepSpeed (each the direct parent of its ranks), then Open MPI, then srun, then other MPIs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from fedspeed.errors import HostfileError

LauncherKind = Literal["deepspeed", "openmpi", "slurm", "mpi", "torchrun", "local", "none"]

# From this number on, Slurm's steps are no parallel programs: the shell of an allocation is one (slurm.h,
# SLURM_INTERACTIVE_STEP).
_FIRST_RESERVED_STEP = 0xFFFFFFFA


@dataclass(frozen=True)
class RankIdentity:
    """A process as its launcher numbers it.

    `local_size` is the number of ranks on this machine, None where the launcher does not say.
    """

    kind: LauncherKind
    world_rank: int
    world_size: int
    local_rank: int
    local_size: int | None

    @property
    def all_local(self) -> bool:
        """Whether all ranks of the job run on this machine."""
        return self.local_size == self.world_size


@dataclass(frozen=True)
class _Variables:
    """Names of the environment variables by which a launcher numbers its ranks."""

    rank: str
    size: str
    local_rank: str
    local_size: str | None


NOT_LAUNCHED = RankIdentity("none", 0, 1, 0, 1)

_LOCAL = _Variables("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
_TORCHRUN = _Variables("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_OPENMPI = _Variables(
    "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"
)
_SLURM = _Variables("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", None)


def identify(env: Mapping[str, str], has_world_info: bool) -> RankIdentity:
    """Return launcher and rank of a process.

    Args:
        env: its environment variables.
        has_world_info: whether an ancestor's command line has DeepSpeed's --world_info.

    Raises:
        HostfileError: variables are missing, or have values that are no ranks.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        if env.get("FEDSPEED_LAUNCH") == "local":
            return _read(env, "local", _LOCAL)
        if "TORCHELASTIC_RUN_ID" in env:
            return _read(env, "torchrun", _TORCHRUN)
        if has_world_info:
            return _read(env, "deepspeed", _LOCAL)
    if "OMPI_COMM_WORLD_RANK" in env:
        return _read(env, "openmpi", _OPENMPI)
    if in_slurm_step(env) and not _started_by_hydra(env):
        identity = _read(env, "slurm", _SLURM)
        if "SLURM_GTIDS" not in env:
            return identity
        return replace(identity, local_size=len(env["SLURM_GTIDS"].split(",")))
    if "PMI_RANK" in env and "PMI_SIZE" in env:
        local_rank = "MPI_LOCALRANKID" if "MPI_LOCALRANKID" in env else "PALS_LOCAL_RANKID"
        return _read(env, "mpi", _Variables("PMI_RANK", "PMI_SIZE", local_rank, "MPI_LOCALNRANKS"))
    if "RANK" in env or "WORLD_SIZE" in env:
        # Somebody else has set the variables of torch's env:// start.
        return _read(env, "torchrun", _TORCHRUN if "LOCAL_WORLD_SIZE" in env else _LOCAL)
    if "PMIX_RANK" in env or "PMI_RANK" in env:
        name = "PMIX_RANK" if "PMIX_RANK" in env else "PMI_RANK"
        raise HostfileError(
            f"{name}={env[name]} is set, but nothing says how many ranks there are; start with mpirun of "
            "Open MPI, srun, or set RANK, WORLD_SIZE and LOCAL_RANK"
        )
    return NOT_LAUNCHED


def in_slurm_step(env: Mapping[str, str]) -> bool:
    """Return whether srun started this process as a task of a parallel step.

    An sbatch script has SLURM_PROCID=0 too, but no step; the shell of salloc may run in a reserved step.
    """
    step = env.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in env and step.isdecimal() and int(step) < _FIRST_RESERVED_STEP


def _started_by_hydra(env: Mapping[str, str]) -> bool:
    """Return whether MPICH's or Intel's mpiexec started this process inside a Slurm step.

    They start one daemon per host with srun, and number their ranks differently than Slurm numbers the
    daemons.
    """
    if "PMI_RANK" not in env or "PMI_SIZE" not in env:
        return False
    return (env["PMI_RANK"], env["PMI_SIZE"]) != (env["SLURM_PROCID"], env.get("SLURM_STEP_NUM_TASKS"))


def _read(env: Mapping[str, str], kind: LauncherKind, names: _Variables) -> RankIdentity:
    world_rank = _number(env, names.rank)
    world_size = _number(env, names.size)
    if not 0 <= world_rank < world_size:
        raise HostfileError(
            f"{names.rank}={world_rank} is no rank of {names.size}={world_size}; unset them, or start again "
            "with one launcher"
        )
    if world_size == 1:
        local_rank = _number(env, names.local_rank) if names.local_rank in env else 0
        return RankIdentity(kind, 0, 1, local_rank, 1)
    local_size = _number(env, names.local_size) if names.local_size and names.local_size in env else None
    return RankIdentity(kind, world_rank, world_size, _number(env, names.local_rank), local_size)


def _number(env: Mapping[str, str], name: str) -> int:
    value = env.get(name)
    if value is None:
        raise HostfileError(
            f"{name} is not set beside the launcher's other variables; start with one of deepspeed, mpirun, "
            f"srun or `python launch.py`, or set {name}"
        )
    if not (value.isascii() and value.isdecimal()):
        raise HostfileError(f"{name}={value!r} is not a number; unset it, or start again with one launcher")
    return int(value)
