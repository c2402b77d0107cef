"""Which GPU of its machine a rank computes on, and which ranks may share one. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fedspeed.errors import ConfigError

REMEDY_PAGE = "docs/gpu.md"


@dataclass(frozen=True)
class Gpu:
    """A GPU, identified by its name.

    Attributes:
        name: equal for two ranks exactly if they compute on the same GPU.
        host: name of its machine, for messages.
        seen: how many GPUs are visible to a rank on that machine.
    """

    name: str
    host: str = field(compare=False, default="")
    seen: int = field(compare=False, default=1)


def device_index(local_rank: int, seen: int) -> int:
    """Return the index of the device that a rank computes on, among those visible to its process.

    A launcher that shows each rank one device shows it as number 0. Where there are more ranks than devices,
    they are assigned round robin, so that neighbouring ranks share none.

    Args:
        local_rank: counts the ranks of a machine.
        seen: number of devices visible to the process; 0 counts as one.
    """
    return local_rank % max(1, seen)


def gpus_of_ranks(ranks: int, seen: int, host: str) -> dict[int, Gpu]:
    """Return the GPU of each rank of a machine on which `seen` GPUs are visible to every rank."""
    return {rank: Gpu(f"GPU {device_index(rank, seen)}", host, seen) for rank in range(ranks)}


def check_gpus(worlds: Mapping[str, Sequence[int]], gpus: Mapping[int, Gpu]) -> list[str]:
    """Check that no two ranks of a torch world compute on the same GPU.

    Args:
        worlds: the ranks of each world, by its name in messages.
        gpus: by rank, for ranks that compute on a GPU.

    Returns:
        a note on each GPU that ranks of different worlds share, which is allowed.

    Raises:
        ConfigError: two ranks of one world share a GPU. NCCL refuses that too, but only after the start.
    """
    problems = []
    notes = []
    world_of = {rank: world for world, ranks in worlds.items() for rank in ranks if rank in gpus}
    for gpu, ranks in _ranks_by_gpu(world_of, gpus).items():
        if len(ranks) < 2:
            continue
        shared = [world for world in worlds if [world_of[rank] for rank in ranks].count(world) > 1]
        if shared:
            together = [rank for rank in ranks if world_of[rank] == shared[0]]
            problems.append(_problem(shared[0], gpu, together))
        else:
            notes.append(
                f"ranks {_joined(ranks)} share {gpu.name} of {gpu.host}: each belongs to another torch "
                "world, so this is allowed. The GPU's memory must hold them all, and they take turns"
            )
    if problems:
        raise ConfigError(problems[0])
    return notes


def _ranks_by_gpu(ranks: Iterable[int], gpus: Mapping[int, Gpu]) -> dict[Gpu, list[int]]:
    ranks_by_gpu: dict[Gpu, list[int]] = {}
    for rank in sorted(ranks):
        ranks_by_gpu.setdefault(gpus[rank], []).append(rank)
    return ranks_by_gpu


def _problem(world: str, gpu: Gpu, ranks: Sequence[int]) -> str:
    plural = "s" if gpu.seen != 1 else ""
    return (
        f"host {gpu.host}: ranks {_joined(ranks)} of {world} would compute on one GPU ({gpu.name}; a rank "
        f"there sees {gpu.seen} GPU{plural}), but a torch world needs one for each of its ranks. Start "
        f"{gpu.seen} rank{plural} on that host (cluster.local_ranks={gpu.seen}, slots={gpu.seen} in the "
        f"hostfile, --num_gpus {gpu.seen}), where clients take turns; or make each rank a cluster of its "
        f"own in a hostfile, since such ranks may share a GPU ({REMEDY_PAGE})"
    )


def _joined(ranks: Sequence[int]) -> str:
    return f"{', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
