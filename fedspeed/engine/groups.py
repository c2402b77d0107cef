"""Process groups of one cluster's torch world: the frozen base is shared over the cluster, the trainable part
over the client.

DeepSpeed partitions each parameter over `param.ds_zero_partition_process_group` when that attribute is set
before conversion (since 0.19.3), so federated ZeRO needs tags on parameters, and no partitioner of its own.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Groups:
    """Process groups of this rank.

    Attributes:
        alone: a group of this rank only.
        client_ranks: cluster ranks of the client, in order.
    """

    cluster: "ProcessGroup"
    client: "ProcessGroup"
    alone: "ProcessGroup"
    client_ranks: tuple[int, ...]
    client_rank: int
    cluster_size: int

    @property
    def client_size(self) -> int:
        """Number of ranks of the client."""
        return len(self.client_ranks)


def make_groups(client_sets: list[tuple[int, ...]]) -> Groups:
    """Build the groups of all clients of the cluster. Collective over the cluster, with the same list.

    Args:
        client_sets: disjoint tuples of cluster ranks, one for each client or set of clients that share ranks.
    """
    import torch
    from deepspeed import comm as dist

    deadline = world_deadline()  # the default of a new group would be half an hour
    rank = dist.get_rank()
    size = dist.get_world_size()
    group_of = {
        tuple(ranks): torch.distributed.new_group(list(ranks), timeout=deadline) for ranks in client_sets
    }
    alone = [torch.distributed.new_group([r], timeout=deadline) for r in range(size)][rank]
    client_ranks = next((ranks for ranks in group_of if rank in ranks), None)
    assert client_ranks is not None, f"cluster rank {rank} belongs to no client of {client_sets}"
    return Groups(
        dist.get_world_group(),
        group_of[client_ranks],
        alone,
        client_ranks=client_ranks,
        client_rank=client_ranks.index(rank),
        cluster_size=size,
    )


def world_deadline() -> timedelta:
    """Return how long collectives of this cluster's torch world wait for a rank."""
    import torch
    from deepspeed import comm as dist
    from deepspeed.accelerator import get_accelerator

    return dist.get_world_group()._get_backend(torch.device(get_accelerator().device_name())).options._timeout


class ClientMpu:
    """Tell DeepSpeed that the data-parallel group is the client, and that there is no model parallelism.

    Model-parallel groups have size 1. At ZeRO-0, DeepSpeed takes `None` for the whole world, and one client's
    gradients would change another client's weights.
    """

    def __init__(self, groups: Groups):
        self._groups = groups

    def get_data_parallel_group(self) -> "ProcessGroup":
        """Return the client's group."""
        return self._groups.client

    def get_data_parallel_rank(self) -> int:
        """Return this rank's number in the client."""
        return self._groups.client_rank

    def get_data_parallel_world_size(self) -> int:
        """Return the number of the client's ranks."""
        return self._groups.client_size

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Return the client's cluster ranks."""
        return list(self._groups.client_ranks)

    def get_model_parallel_group(self) -> "ProcessGroup":
        """Return the group over which norms and overflows are found together."""
        return self._groups.alone

    def get_model_parallel_rank(self) -> int:
        """Return this rank's number among the model-parallel ranks."""
        return 0

    def get_model_parallel_world_size(self) -> int:
        """Return the number of model-parallel ranks."""
        return 1


class StageMpu(ClientMpu):
    """Tell DeepSpeed that the stages of a pipeline form the model-parallel group: each stage has optimizers
    of its own, but gradient norms and overflows are those of the whole pipeline.

    Every stage says that its model-parallel rank is 0. On other ranks DeepSpeed counts only gradients with
    the attribute `model_parallel`, which the gradients of its 16-bit optimizers do not have.
    """

    def __init__(self, groups: Groups, pipeline: "ProcessGroup", stages: int):
        super().__init__(groups)
        self._pipeline = pipeline
        self._stages = stages

    def get_model_parallel_group(self) -> "ProcessGroup":
        """Return the pipeline's group."""
        return self._pipeline

    def get_model_parallel_world_size(self) -> int:
        """Return the number of stages."""
        return self._stages


def single_rank_groups(groups: Groups) -> Groups:
    """Return the groups of this rank as if it were a client and a cluster of its own."""
    return Groups(
        groups.alone,
        groups.alone,
        groups.alone,
        client_ranks=(groups.client_ranks[groups.client_rank],),
        client_rank=0,
        cluster_size=1,
    )


def parameter_group(
    parameter: nn.Parameter, persistence_threshold: int, base_partition: str, groups: Groups
) -> "ProcessGroup":
    """Return the group over which a parameter is partitioned.

    Small frozen tensors are partitioned over the client: DeepSpeed keeps tensors up to the threshold
    resident, and gathers all resident ones, base and adapter together, in every optimizer step. (Where the
    base is partitioned over a cluster, the threshold is 0, see `ds_config.resolve_autos`.)

    Args:
        persistence_threshold: in elements.
        base_partition: value of engine.base_partition.
    """
    if parameter.requires_grad or parameter.numel() <= persistence_threshold:
        return groups.client
    return base_group(base_partition, groups)


def base_group(base_partition: str, groups: Groups) -> "ProcessGroup":
    """Return the group of the ranks that share one copy of the frozen base."""
    return {"cluster": groups.cluster, "client": groups.client, "rank": groups.alone}[base_partition]
