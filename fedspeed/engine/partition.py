"""ZeRO-3 conversion of a model whose weights arrive block by block, each parameter over its own group."""

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
from deepspeed.runtime.zero.partition_parameters import Init

from fedspeed.engine.groups import Groups, base_group, parameter_group

PERSISTENCE_THRESHOLD = 100_000  # DeepSpeed's default, in elements


class TaggedInit(Init):
    """`zero.Init` that partitions parameters one at a time over the group each is tagged with.

    Differences from DeepSpeed's own: no broadcast (every rank read the value from its own file), and gathers
    sort their parameters by `ds_id`. A prefetch bucket may mix base and adapter, hence two communicators, and
    DeepSpeed iterates a set whose
    order differs between ranks: with clients of two ranks that is a deadlock.
    """

    def __init__(self, groups: Groups, ds_config: dict, mpu, base_partition: str, clock):
        super().__init__(
            data_parallel_group=groups.client,
            config_dict_or_path=ds_config,
            mpu=mpu,
            remote_device=ds_config["zero_optimization"].get("offload_param", {}).get("device"),
        )
        self._persistence_threshold = ds_config["zero_optimization"].get(
            "stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD
        )
        self._groups = groups
        self._base_partition = base_partition
        self._clock = clock
        # DeepSpeed compares the first traces over the whole world, which only ranks that share the base reach
        # together.
        coordinator.assert_ints_same_as_other_ranks = EqualAcrossRanks(base_group(base_partition, groups))

    def place(self, name, parameter):
        """Partition one full parameter in place; what stays of it on this rank is its shard."""
        parameter.data = parameter.data.to(self.local_device)
        parameter.ds_zero_partition_process_group = parameter_group(
            parameter, self._persistence_threshold, self._base_partition, self._groups
        )
        self._convert_to_deepspeed_param(parameter)
        parameter.partition()
        return parameter

    def _convert_to_deepspeed_param(self, param):
        super()._convert_to_deepspeed_param(param)
        gather = param.all_gather_coalesced

        def ordered(params, *args, **kwargs):
            with self._clock.stage("gather"):
                handle = gather(sorted(params, key=lambda p: p.ds_id), *args, **kwargs)
            return TimedHandle(handle, self._clock)

        param.all_gather_coalesced = ordered


class EqualAcrossRanks:
    """Checks that a list of integers is the same on all ranks of a group."""

    def __init__(self, group):
        self._group = group

    def __call__(self, ints: list[int]) -> None:
        length = torch.tensor([len(ints), -len(ints)], device=get_accelerator().current_device_name())
        dist.all_reduce(length, op=dist.ReduceOp.MAX, group=self._group)
        if length[0] == -length[1]:
            both = torch.tensor([*ints, *(-i for i in ints)], device=length.device)
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self._group)
            if (both[: len(ints)] == -both[len(ints) :]).all():
                return
        raise RuntimeError(
            "ranks that share the base visited its modules in different orders; is the same model and code "
            "on all of them?"
        )


class TimedHandle:
    """A gather's handle whose wait is counted as time spent gathering."""

    def __init__(self, handle, clock):
        self._handle = handle
        self._clock = clock

    def wait(self, *args, **kwargs):
        with self._clock.stage("gather"):
            return self._handle.wait(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self._handle, name)
