"""The keys of DeepSpeed 0.19.8's configuration, and who decides each of them. Data only.

DeepSpeed itself ignores unknown keys at the top level, and refuses nested ones only after every process has
started; a misspelt `zero_optimisation` would silently train without ZeRO. `tests/config` compares these
tables with the installed DeepSpeed.
"""

AUTO = "auto"

_OFFLOAD = {"device": str, "nvme_path": str, "buffer_count": int, "buffer_size": int, "pin_memory": bool}

# Keys that a user may write. A type stands for a value of it, a dict for a block with exactly these keys, the
# type `dict` for a block that is passed on unchecked.
SCHEMA = {
    "train_batch_size": int,
    "train_micro_batch_size_per_gpu": int,
    "gradient_accumulation_steps": int,
    "managed_gradient_accumulation": bool,
    "gradient_clipping": float,
    "prescale_gradients": bool,
    "gradient_predivide_factor": float,
    "gradient_allreduce_op": str,
    "communication_data_type": str,
    "disable_allgather": bool,
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "disable_python_gc": bool,
    "log_level": str,
    "vocabulary_size": int,
    "optimizer": {"type": str, "params": dict, "legacy_fusion": bool},
    "fp16": {
        "enabled": bool,
        "auto_cast": bool,
        "loss_scale": float,
        "initial_scale_power": int,
        "loss_scale_window": int,
        "hysteresis": int,
        "consecutive_hysteresis": bool,
        "min_loss_scale": int,
        "fp16_master_weights_and_grads": bool,
    },
    "bf16": {
        "enabled": bool,
        "immediate_grad_update": bool,
        "check_grad_overflow": bool,
        "bf16_master_weights_and_grads": bool,
        "bf16_optimizer_states": bool,
    },
    "zero_optimization": {
        "stage": int,
        "contiguous_gradients": bool,
        "reduce_scatter": bool,
        "reduce_bucket_size": int,
        "use_multi_rank_bucket_allreduce": bool,
        "allgather_partitions": bool,
        "allgather_bucket_size": int,
        "overlap_comm": bool,
        "compute_grad_norm": bool,
        "load_from_fp32_weights": bool,
        "elastic_checkpoint": bool,
        "sub_group_size": int,
        "stage3_prefetch_bucket_size": int,
        "stage3_param_persistence_threshold": int,
        "stage3_model_persistence_threshold": int,
        "stage3_max_live_parameters": int,
        "stage3_max_reuse_distance": int,
        "stage3_gather_16bit_weights_on_model_save": bool,
        "stage3_module_granularity_threshold": int,
        "stage3_use_all_reduce_for_fetch_params": bool,
        "stage3_allgather_sequential": bool,
        "ignore_unused_parameters": bool,
        "legacy_stage1": bool,
        "round_robin_gradients": bool,
        "parameter_alignment": bool,
        "zero_hpz_partition_size": int,
        "zero_quantized_weights": bool,
        "zero_quantized_nontrainable_weights": bool,
        "zero_quantized_gradients": bool,
        "memory_efficient_linear": bool,
        "pipeline_loading_checkpoint": bool,
        "override_module_apply": bool,
        "log_trace_cache_warnings": bool,
        "enable_sanity_checks": bool,
        "save_muon_momentum_buffer_in_memory": bool,
        "zenflow": dict,
        "leaf_module": dict,
        "cpu_offload": bool,
        "cpu_offload_param": bool,
        "cpu_offload_use_pin_memory": bool,
        "stage3_gather_fp16_weights_on_model_save": bool,
        "offload_param": {**_OFFLOAD, "max_in_cpu": int},
        "offload_optimizer": {
            **{key: type_ for key, type_ in _OFFLOAD.items() if key != "buffer_size"},
            "pipeline_read": bool,
            "pipeline_write": bool,
            "fast_init": bool,
            "ratio": float,
            "super_offload": bool,
            "cpuadam_cores_perc": float,
        },
    },
    "aio": {
        "block_size": int,
        "queue_depth": int,
        "intra_op_parallelism": int,
        "single_submit": bool,
        "overlap_events": bool,
        "use_gds": bool,
    },
    "data_types": {
        "grad_accum_dtype": str,
        "param_dtype": str,
        "buffer_dtype": str,
        "keep_in_fp32_modules": (str, list),
    },
    "comms_logger": {"enabled": bool, "verbose": bool, "prof_all": bool, "prof_ops": list, "debug": bool},
    "flops_profiler": {
        "enabled": bool,
        "recompute_fwd_factor": float,
        "profile_step": int,
        "module_depth": int,
        "top_modules": int,
        "detailed": bool,
        "output_file": str,
    },
    "timers": dict,
    "torch_autocast": dict,
    "compile": dict,
    "scheduler": dict,
    "tensorboard": dict,
    "wandb": dict,
    "csv_monitor": dict,
    "comet": dict,
    "activation_checkpointing": dict,
    "checkpoint": dict,
    "datastates_ckpt": (dict, bool),
    "data_efficiency": dict,
    "dataloader_drop_last": bool,
    "pipeline": {
        "stages": (str, int),
        "partition": str,
        "seed_layers": bool,
        "activation_checkpoint_interval": int,
        "pipe_partitioned": bool,
        "grad_partitioned": bool,
    },
    "tensor_parallel": dict,
    "expert_parallel": dict,
    "sequence_parallel_size": int,
    "seq_parallel_communication_data_type": str,
    "use_data_before_expert_parallelism": bool,
    "hybrid_engine": dict,
    "autotuning": dict,
    "weight_quantization": dict,
}

# Left as `auto` for the engine, which knows the model (sizes of its blocks, its largest matrix) and the host.
ENGINE_AUTOS = frozenset({
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.sub_group_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.offload_param.nvme_path",
    "zero_optimization.offload_param.buffer_count",
    "zero_optimization.offload_param.buffer_size",
    "zero_optimization.offload_optimizer.nvme_path",
})

# DeepSpeed accepts `auto` here itself, or files made for the Hugging Face Trainer have it where it has no
# effect.
HARMLESS_AUTOS = frozenset({"data_types.keep_in_fp32_modules", "train_batch_size"})

# Always set, because the engine relies on them; another value in the file is refused.
FORCED = {
    "zero_allow_untested_optimizer": True,  # our optimizers are torch's own
    # torch's optimizer also updates offloaded states; DeepSpeedCPUAdam would need a compiler.
    "zero_force_ds_cpu_optimizer": False,
}

# Removed from DeepSpeed: key -> remedy.
_MICS = "remove it; engine.base_partition says which ranks share a copy of the base"
_REMOVE = "remove it"
REMOVED = {
    "nebula": "remove it; the round journal is FedSpeed's checkpoint",
    "compression_training": _REMOVE,
    "amp": "remove it; model.dtype sets the numeric type",
    "bfloat16": "write bf16",
    "quantize_training": _REMOVE,
    "sparse_gradients": _REMOVE,
    "eigenvalue": _REMOVE,
    "sparse_attention": _REMOVE,
    "elasticity": "remove it; a run that lost a rank resumes from its journal",
    "graph_harvesting": _REMOVE,
    "curriculum_learning": _REMOVE,
    "progressive_layer_drop": _REMOVE,
    "aio.thread_count": "write aio.intra_op_parallelism",
    "zero_optimization.mics_shard_size": _MICS,
    "zero_optimization.mics_hierarchical_params_gather": _MICS,
    "zero_optimization.zeropp_loco_param": _REMOVE,
}

_MONITOR = (
    "remove it; FedSpeed writes TensorBoard itself (monitor.tensorboard), DeepSpeed's writer would "
    "run once per cluster"
)
_PARALLEL = (
    "remove it; the clients' own ranks are data parallel, and the base is divided by ZeRO stage 3 "
    "and engine.base_partition"
)
_QUANTISED = (
    "remove it; it exists for CUDA only and cannot tell the cluster's frozen base from a client's adapter"
)
_OURS = "remove it; FedSpeed's own optimizer, engine and journal take its place"
_DATA = "remove it; the data section sets what is read"

# Keys of DeepSpeed that a federated run does not support: key -> remedy. `false`, `null` and the values of
# REFUSED_OFF switch the feature off and are accepted.
REFUSED = {
    "train_batch_size": "remove it; it follows from train.micro_batch, train.accumulation and the ranks of "
    "a client",
    "scheduler": "remove it; train.schedule and train.warmup_steps set the learning rate over all rounds",
    "tensorboard.enabled": _MONITOR,
    "wandb.enabled": _MONITOR,
    "csv_monitor.enabled": _MONITOR,
    "comet.enabled": _MONITOR,
    "activation_checkpointing": "remove it and set engine.activation_checkpointing=true",
    "checkpoint": "remove it; the checkpoint section sets what the round journal keeps",
    "datastates_ckpt": "remove it; the checkpoint section sets what the round journal keeps",
    "data_efficiency.enabled": _DATA,
    "dataloader_drop_last": _DATA,
    "pipeline.seed_layers": "remove it; a stage draws its dropout from the run's seed, the client and the "
    "step",
    "tensor_parallel": _PARALLEL,
    "expert_parallel": _PARALLEL,
    "sequence_parallel_size": _PARALLEL,
    "seq_parallel_communication_data_type": _PARALLEL,
    "use_data_before_expert_parallelism": _PARALLEL,
    "hybrid_engine.enabled": "remove it; it serves text generation during training",
    "autotuning.enabled": "remove it; it expects equal GPUs",
    "weight_quantization": "remove it; it is for inference",
    "torch_autocast.enabled": "remove it; model.dtype sets the numeric type",
    "compile.deepcompile": "remove it; it replaces the gradient path that federated ZeRO relies on",
    "fp16.fp16_master_weights_and_grads": "remove it; masters are kept in fp32, or the aggregate would be "
    "rounded",
    "bf16.bf16_master_weights_and_grads": "remove it; masters are kept in fp32, or the aggregate would be "
    "rounded",
    "bf16.bf16_optimizer_states": "remove it; masters are kept in fp32, or the aggregate would be rounded",
    "zero_optimization.zero_hpz_partition_size": "remove it; engine.base_partition=client keeps a copy of "
    "the base in each client",
    "zero_optimization.zero_quantized_weights": _QUANTISED,
    "zero_optimization.zero_quantized_nontrainable_weights": _QUANTISED,
    "zero_optimization.zero_quantized_gradients": _QUANTISED,
    "zero_optimization.zenflow": _OURS,
    "zero_optimization.elastic_checkpoint": _OURS,
    "zero_optimization.legacy_stage1": _OURS,
    "zero_optimization.offload_optimizer.super_offload": _OURS,
    "zero_optimization.cpu_offload": "it is deprecated; write offload_optimizer: {device: cpu}",
    "zero_optimization.cpu_offload_param": "it is deprecated; write offload_param: {device: cpu}",
    "zero_optimization.cpu_offload_use_pin_memory": "it is deprecated; write pin_memory inside "
    "offload_param and offload_optimizer",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "it is deprecated; remove it, the export "
    "gathers by itself",
}
REFUSED_OFF = {
    "zero_optimization.zero_hpz_partition_size": (1,),
    "sequence_parallel_size": (1,),
    "train_batch_size": (AUTO,),
}
