"""ZeRO-3 conversion of a model whose weights arrive block by block, each parameter over its own group."""

from deepspeed.runtime.zero.partition_parameters import Init

from fedspeed.engine.groups import Groups, partition_group


class TaggedInit(Init):
    """`zero.Init` that partitions parameters one at a time over the group each is tagged with.

    Differences from DeepSpeed's own: no broadcast (every rank read the value from its own file), and gathers sort their
    parameters by `ds_id`. A prefetch bucket may mix base and adapter, hence two communicators, and DeepSpeed iterates a set whose
    order differs between ranks: with clients of two ranks that is a deadlock.
    """

    def __init__(self, groups: Groups, ds_config: dict, mpu, base_partition: str, clock):
        super().__init__(data_parallel_group=groups.client, config_dict_or_path=ds_config, mpu=mpu,
                         remote_device=ds_config["zero_optimization"].get("offload_param", {}).get("device"))
        self._groups, self._base_partition, self._clock = groups, base_partition, clock

    def place(self, name, parameter):
        """Partition one full parameter in place; what stays of it on this rank is its shard."""
        parameter.data = parameter.data.to(self.local_device)
        parameter.ds_zero_partition_process_group = partition_group(
            parameter, Init.param_persistence_threshold, self._base_partition, self._groups)
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


class TimedHandle:
    """A gather's handle whose wait is counted as time spent gathering."""

    def __init__(self, handle, clock):
        self._handle, self._clock = handle, clock

    def wait(self, *args, **kwargs):
        with self._clock.stage("gather"):
            return self._handle.wait(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self._handle, name)
