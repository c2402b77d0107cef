"""Which launcher started this process, and as which rank: a pure reading of environment variables.

Launchers nest, and each leaves its variables behind: a rank of `mpirun` inside an sbatch script sees Slurm's
    variables of the script too,
and on other hosts those of the step that started mpirun's daemon. The nearest launcher must win, so they are
asked from the inside out: our own supervisor, torchrun, DeepSpeed (each the direct parent of its ranks), then
Open MPI, then srun, then other MPIs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fedspeed.errors import HostfileError

# Steps that Slurm makes for its own use (slurm.h: SLURM_INTERACTIVE_STEP and above): the shell of an
# allocation is no parallel program.
_FIRST_RESERVED_STEP = 0xFFFFFFFA


@dataclass(frozen=True)
class RankIdentity:
    """`local_size` is the number of ranks on this machine, None where the launcher does not tell."""

    kind: str
    world_rank: int
    world_size: int
    local_rank: int
    local_size: int | None

    @property
    def all_local(self) -> bool:
        return self.local_size == self.world_size


ALONE = RankIdentity("none", 0, 1, 0, 1)


def identify(env: Mapping[str, str], has_world_info: bool) -> RankIdentity:
    """Finds kind and rank.

    Args:
        has_world_info: whether an ancestor carries DeepSpeed's --world_info.

    Raises:
        HostfileError: half a set of variables, or values that are no ranks.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        if env.get("FEDSPEED_LAUNCH") == "local":
            return _read(
                env, "local", "RANK", size="WORLD_SIZE", local_rank="LOCAL_RANK", local_size="LOCAL_SIZE"
            )
        if "TORCHELASTIC_RUN_ID" in env:
            return _read(
                env,
                "torchrun",
                "RANK",
                size="WORLD_SIZE",
                local_rank="LOCAL_RANK",
                local_size="LOCAL_WORLD_SIZE",
            )
        if has_world_info:
            return _read(
                env, "deepspeed", "RANK", size="WORLD_SIZE", local_rank="LOCAL_RANK", local_size="LOCAL_SIZE"
            )
    if "OMPI_COMM_WORLD_RANK" in env:
        return _read(
            env,
            "openmpi",
            "OMPI_COMM_WORLD_RANK",
            size="OMPI_COMM_WORLD_SIZE",
            local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
            local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
        )
    if in_slurm_step(env) and not _started_by_hydra(env):
        identity = _read(
            env,
            "slurm",
            "SLURM_PROCID",
            size="SLURM_STEP_NUM_TASKS",
            local_rank="SLURM_LOCALID",
            local_size=None,
        )
        if "SLURM_GTIDS" not in env:
            return identity
        return RankIdentity(
            "slurm",
            identity.world_rank,
            identity.world_size,
            identity.local_rank,
            len(env["SLURM_GTIDS"].split(",")),
        )
    if "PMI_RANK" in env and "PMI_SIZE" in env:
        local_rank = "MPI_LOCALRANKID" if "MPI_LOCALRANKID" in env else "PALS_LOCAL_RANKID"
        return _read(
            env, "mpi", "PMI_RANK", size="PMI_SIZE", local_rank=local_rank, local_size="MPI_LOCALNRANKS"
        )
    if "RANK" in env or "WORLD_SIZE" in env:
        # The convention of torch's env:// start, whoever set the variables.
        local_size = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "LOCAL_SIZE"
        return _read(
            env, "torchrun", "RANK", size="WORLD_SIZE", local_rank="LOCAL_RANK", local_size=local_size
        )
    if "PMIX_RANK" in env or "PMI_RANK" in env:
        name = "PMIX_RANK" if "PMIX_RANK" in env else "PMI_RANK"
        raise HostfileError(
            f"{name}={env[name]} is set, but nothing says how many ranks there are; start with mpirun of "
            "Open MPI, srun, "
            "or set RANK, WORLD_SIZE and LOCAL_RANK"
        )
    return ALONE


def in_slurm_step(env: Mapping[str, str]) -> bool:
    """Whether srun started this process as a task of a parallel step.

    An sbatch script has SLURM_PROCID=0 too, but no step; an interactive salloc shell may stand in a reserved
    one.
    """
    step = env.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in env and step.isdecimal() and int(step) < _FIRST_RESERVED_STEP


def _started_by_hydra(env: Mapping[str, str]) -> bool:
    """MPICH's and Intel's mpiexec start one daemon per host with srun; their ranks are numbered otherwise
    than the daemons.
    """
    return (
        "PMI_RANK" in env
        and "PMI_SIZE" in env
        and (env["PMI_RANK"], env["PMI_SIZE"]) != (env["SLURM_PROCID"], env.get("SLURM_STEP_NUM_TASKS"))
    )


def _read(
    env: Mapping[str, str], kind: str, rank: str, size: str, local_rank: str, *, local_size: str | None
) -> RankIdentity:
    world_rank = _number(env, rank)
    world_size = _number(env, size)
    if not 0 <= world_rank < world_size:
        raise HostfileError(
            f"{rank}={world_rank} is no rank of {size}={world_size}; unset them, or start again with one "
            "launcher"
        )
    if world_size == 1:
        return RankIdentity(kind, 0, 1, _number(env, local_rank) if local_rank in env else 0, 1)
    count = _number(env, local_size) if local_size and local_size in env else None
    return RankIdentity(kind, world_rank, world_size, _number(env, local_rank), count)


def _number(env: Mapping[str, str], name: str) -> int:
    value = env.get(name)
    if value is None:
        raise HostfileError(
            f"{name} is not set beside the launcher's other variables; start with one of deepspeed, mpirun, "
            "srun or "
            f"`python launch.py`, or set {name}"
        )
    if not (value.isascii() and value.isdecimal()):
        raise HostfileError(f"{name}={value!r} is not a number; unset it, or start again with one launcher")
    return int(value)
