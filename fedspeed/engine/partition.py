"""ZeRO-3 conversion of a model whose weights are read block by block, with a process group for each
parameter.
"""

from collections.abc import Iterable
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
from deepspeed.runtime.zero.partition_parameters import Init
from torch import nn
from torch.distributed import ProcessGroup

from fedspeed.engine.clock import Clock
from fedspeed.engine.groups import ClientMpu, Groups, base_group, parameter_group

PERSISTENCE_THRESHOLD = 100_000  # DeepSpeed's default, in elements


class TaggedInit(Init):
    """Partition parameters one at a time, each over the group it is tagged with; a subclass of `zero.Init`.

    It differs from DeepSpeed's own in two ways. Nothing is broadcast, since every rank reads the values from
    its own files. And gathers sort their parameters by `ds_id`: a prefetch bucket may contain base and
    adapter, hence use two communicators, and DeepSpeed iterates over a set in an order that differs between
    ranks. With clients of two ranks that would be a deadlock.
    """

    def __init__(
        self, groups: Groups, ds_config: dict[str, Any], mpu: ClientMpu, base_partition: str, clock: Clock
    ):
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
        # DeepSpeed compares the first traces over the whole world. Only ranks that share the base make the
        # same passes.
        coordinator.assert_ints_same_as_other_ranks = EqualAcrossRanks(base_group(base_partition, groups))

    def place(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """Partition a full parameter in place; its shard remains on this rank."""
        parameter.data = parameter.data.to(self.local_device)
        tagged: Any = parameter  # DeepSpeed adds attributes and methods to it
        tagged.ds_zero_partition_process_group = parameter_group(
            parameter, self._persistence_threshold, self._base_partition, self._groups
        )
        self._convert_to_deepspeed_param(tagged)
        tagged.partition()
        return parameter

    def _convert_to_deepspeed_param(self, param: Any) -> None:
        super()._convert_to_deepspeed_param(param)
        gather = param.all_gather_coalesced

        def gather_in_order(params: Iterable[Any], *args: Any, **kwargs: Any) -> "TimedHandle":
            with self._clock.stage("gather"):
                handle = gather(sorted(params, key=lambda p: p.ds_id), *args, **kwargs)
            return TimedHandle(handle, self._clock)

        param.all_gather_coalesced = gather_in_order


class EqualAcrossRanks:
    """Check that a list of integers is the same on all ranks of a group. Collective over the group."""

    def __init__(self, group: ProcessGroup):
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
    """The handle of a gather, whose waiting time counts as `gather`."""

    def __init__(self, handle: Any, clock: Clock):
        self._handle = handle
        self._clock = clock

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        """Wait for the gather."""
        with self._clock.stage("gather"):
            return self._handle.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)
