"""Who shares what inside one cluster's torch world: the frozen base over the cluster, the trainable part over
the client.

DeepSpeed partitions each parameter over `param.ds_zero_partition_process_group` when that attribute is set
before conversion (since 0.19.3), so federated ZeRO is a matter of tagging, not of another partitioner.
"""

from dataclasses import dataclass
from datetime import timedelta

from torch import nn


@dataclass(frozen=True)
class Groups:
    """Process groups of this rank. `client_ranks` are cluster ranks, in order."""

    cluster: object
    client: object
    alone: object
    client_ranks: tuple[int, ...]
    client_rank: int
    cluster_size: int

    @property
    def client_size(self) -> int:
        return len(self.client_ranks)


def make_groups(client_sets: list[tuple[int, ...]]) -> Groups:
    """Build the groups of all clients of the cluster; every rank of the cluster must call this with the same
    list.

    Args:
        client_sets: disjoint tuples of cluster ranks, one for each client or set of clients that share ranks.
    """
    import torch
    from deepspeed import comm as dist

    deadline = world_deadline()  # a new group would wait half an hour for a lost rank
    me = dist.get_rank()
    size = dist.get_world_size()
    client_group = None
    mine = None
    for ranks in client_sets:
        group = torch.distributed.new_group(list(ranks), timeout=deadline)
        if me in ranks:
            client_group = group
            mine = tuple(ranks)
    alone = [torch.distributed.new_group([r], timeout=deadline) for r in range(size)][me]
    assert mine is not None, f"cluster rank {me} belongs to no client of {client_sets}"
    return Groups(
        dist.get_world_group(),
        client_group,
        alone,
        client_ranks=mine,
        client_rank=mine.index(me),
        cluster_size=size,
    )


def world_deadline() -> timedelta:
    """How long this cluster's torch world waits for a rank."""
    import torch
    from deepspeed import comm as dist
    from deepspeed.accelerator import get_accelerator

    return dist.get_world_group()._get_backend(torch.device(get_accelerator().device_name())).options._timeout


class ClientMpu:
    """Tells DeepSpeed that data parallelism is the client, and that there is no model parallelism.

    Model-parallel groups have size 1: at ZeRO-0 DeepSpeed takes `None` for the whole world and one client's
    gradients would move another's weights.
    """

    def __init__(self, groups: Groups):
        self._groups = groups

    def get_data_parallel_group(self):
        return self._groups.client

    def get_data_parallel_rank(self):
        return self._groups.client_rank

    def get_data_parallel_world_size(self):
        return self._groups.client_size

    def get_data_parallel_group_ranks(self):
        return list(self._groups.client_ranks)

    def get_model_parallel_group(self):
        return self._groups.alone

    def get_model_parallel_rank(self):
        return 0

    def get_model_parallel_world_size(self):
        return 1


class StageMpu(ClientMpu):
    """A stage's optimizers are its own, but norms and overflows are those of the whole pipeline, which
    DeepSpeed calls the model-parallel group.

    Every stage says that it is the first of them: DeepSpeed counts on the others what carries a mark only
        (`model_parallel`), and its 16-bit optimizers
    look for the mark on gradients, which have none.
    """

    def __init__(self, groups: Groups, pipeline, stages: int):
        super().__init__(groups)
        self._pipeline = pipeline
        self._stages = stages

    def get_model_parallel_group(self):
        return self._pipeline

    def get_model_parallel_world_size(self):
        return self._stages


def alone(groups: Groups) -> Groups:
    """This rank as a client of its own."""
    return Groups(
        groups.alone,
        groups.alone,
        groups.alone,
        client_ranks=(groups.client_ranks[groups.client_rank],),
        client_rank=0,
        cluster_size=1,
    )


def parameter_group(parameter: nn.Parameter, persistence_threshold: int, base_partition: str, groups: Groups):
    """The group a parameter is partitioned over.

    Small frozen tensors go to the client: DeepSpeed keeps tensors up to the threshold resident, and gathers
        all of those again, base and
    adapter together, in every optimizer step. (Over a cluster the threshold is 0, see `ds_config.finish`.)
    """
    if parameter.requires_grad or parameter.numel() <= persistence_threshold:
        return groups.client
    return base_group(base_partition, groups)


def base_group(base_partition: str, groups: Groups):
    """The ranks that share one copy of the frozen base."""
    return {"cluster": groups.cluster, "client": groups.client, "rank": groups.alone}[base_partition]
