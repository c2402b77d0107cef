"""Conflicts between a DeepSpeed section and the rest of the configuration, with the text that names them."""

# (the deepspeed section, overrides of the configuration, text of the message)
CONFLICTS = [
    (
        {"train_micro_batch_size_per_gpu": 8},
        ["train.micro_batch=4"],
        "deepspeed.train_micro_batch_size_per_gpu is 8, but train.micro_batch is 4; write auto for it, "
        "or set train.micro_batch=8",
    ),
    (
        {"gradient_accumulation_steps": 2},
        [],
        "train.accumulation is 1; write auto for it, or set train.accumulation=2",
    ),
    (
        {"gradient_clipping": 1.0},
        [],
        "gradient_clipping is 1.0, but train.clip is 0.0; write auto for it, or set train.clip=1.0",
    ),
    (
        {"bf16": {"enabled": True}},
        ["model.dtype=fp32"],
        "bf16.enabled is true, but model.dtype is fp32; write auto for it, or set model.dtype=bf16",
    ),
    ({"fp16": {"enabled": True}}, [], "fp16.enabled is true, but model.dtype is auto"),
    (
        {"bf16": {"enabled": False}},
        [],
        "bf16.enabled is false, but model.dtype is auto; write auto for it, or set another model.dtype",
    ),
    (
        {"train_batch_size": 32},
        [],
        "train_batch_size=32 is not possible in a federated run; remove it; it follows from "
        "train.micro_batch",
    ),
    ({"train_batch_size": "many"}, [], 'train_batch_size is "many", but must be a whole number'),
    (
        {"scheduler": {"type": "WarmupLR"}},
        [],
        "scheduler is not possible in a federated run; remove it; train.schedule",
    ),
    (
        {"optimizer": {"type": "Lion"}},
        [],
        "optimizer.type is Lion, but train.optimizer is adamw; remove the optimizer block",
    ),
    (
        {"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}},
        [],
        "optimizer.params.lr is 0.5, but train.lr is 0.001",
    ),
    (
        {"optimizer": {"params": {"betas": [0.9, 0.95]}}},
        [],
        "betas is [0.9, 0.95], but train.beta1 and train.beta2 are [0.9, 0.999]",
    ),
    (
        {"optimizer": {"params": {"momentum": 0.9}}},
        [],
        "optimizer.params.momentum=0.9 is not a setting of FedSpeed's adamw; remove it",
    ),
    (
        {"tensorboard": {"enabled": True}},
        [],
        "tensorboard.enabled=true is not possible in a federated run; remove it; FedSpeed writes TensorBoard",
    ),
    ({"wandb": {"enabled": True}}, [], "wandb.enabled=true"),
    ({"csv_monitor": {"enabled": True}}, [], "csv_monitor.enabled=true"),
    ({"comet": {"enabled": True}}, [], "comet.enabled=true"),
    ({"activation_checkpointing": {}}, [], "set engine.activation_checkpointing=true"),
    (
        {"pipeline": {"stages": "auto"}},
        [],
        "pipeline is given, but engine.pipeline is none; set engine.pipeline=client",
    ),
    (
        {"pipeline": {"stages": 2}},
        ["engine.pipeline=client"],
        "pipeline.stages=2, but engine.pipeline=client makes a stage of every rank; write auto",
    ),
    (
        {"pipeline": {"partition": "uniform"}},
        ["engine.pipeline=client"],
        'pipeline.partition="uniform", but engine.cuts says',
    ),
    (
        {"pipeline": {"activation_checkpoint_interval": 1}},
        ["engine.pipeline=client"],
        "engine.activation_checkpointing is 0; write auto for it, or set "
        "engine.activation_checkpointing=True",
    ),
    (
        {"pipeline": {"seed_layers": True}},
        ["engine.pipeline=client"],
        "pipeline.seed_layers=true is not possible",
    ),
    ({"tensor_parallel": {"autotp_size": 2}}, [], "tensor_parallel is not possible"),
    ({"sequence_parallel_size": 2}, [], "sequence_parallel_size=2 is not possible"),
    (
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
        [],
        "engine.base_partition=client keeps",
    ),
    (
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
        [],
        "zero_optimization.zero_quantized_weights=true",
    ),
    (
        {"zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True}},
        [],
        "zero_quantized_nontrainable_weights=true",
    ),
    (
        {"zero_optimization": {"stage": 2, "cpu_offload": True}},
        [],
        "it is deprecated; write offload_optimizer: {device: cpu}",
    ),
    ({"bf16": {"bf16_master_weights_and_grads": True}}, [], "masters are kept in fp32"),
    ({"gradient_allreduce_op": "sum"}, [], 'gradient_allreduce_op="sum" would scale'),
    (
        {"zero_allow_untested_optimizer": False},
        [],
        "zero_allow_untested_optimizer is false, but FedSpeed runs torch's own optimizers; remove it",
    ),
    ({"zero_force_ds_cpu_optimizer": True}, [], "zero_force_ds_cpu_optimizer is true, but FedSpeed"),
    ({"bfloat16": {"enabled": True}}, [], "bfloat16 was removed from DeepSpeed before 0.19.8; write bf16"),
    ({"elasticity": {"enabled": True}}, [], "elasticity was removed from DeepSpeed before 0.19.8"),
    ({"nebula": {}}, [], "nebula was removed"),
    ({"compression_training": {}}, [], "compression_training was removed"),
    (
        {"zero_optimization": {"stage": 3, "mics_shard_size": 8}},
        [],
        "zero_optimization.mics_shard_size was removed from DeepSpeed before 0.19.8; remove it; "
        "engine.base_partition",
    ),
    (
        {"aio": {"thread_count": 4}},
        [],
        "aio.thread_count was removed from DeepSpeed before 0.19.8; write aio.intra_op_parallelism",
    ),
    (
        {"zero_optimisation": {"stage": 3}},
        [],
        "zero_optimisation is not a key of DeepSpeed 0.19.8; did you mean zero_optimization?",
    ),
    (
        {"zero_optimization": {"stag": 3}},
        [],
        "zero_optimization.stag is not a key of DeepSpeed 0.19.8; did you mean zero_optimization.stage?",
    ),
    (
        {"zero_optimization": {"prefetch_bucket_size": 3}},
        [],
        "did you mean zero_optimization.stage3_prefetch_bucket_size?",
    ),
    ({"zero_optimization": True}, [], "zero_optimization is true, but it is a block"),
    ({"zero_optimization": {"stage": "3"}}, [], 'zero_optimization.stage is "3", but must be a whole number'),
    ({"zero_optimization": {"stage": 4}}, [], "zero_optimization.stage is 4; there are 0, 1, 2 and 3"),
    (
        {"zero_optimization": {"stage": "auto"}},
        [],
        "zero_optimization.stage is auto, but FedSpeed does not choose it",
    ),
    (
        {"zero_optimization": {"reduce_bucket_size": 2.5}},
        [],
        "reduce_bucket_size is 2.5, but must be a whole number",
    ),
    ({"wall_clock_breakdown": "yes"}, [], 'wall_clock_breakdown is "yes", but must be true or false'),
    (
        {"communication_data_type": "auto"},
        [],
        "communication_data_type is auto, but FedSpeed does not choose it; write a value",
    ),
    (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        [],
        "zero_optimization.offload_param.device=cpu needs stage 3, but zero_optimization.stage is 2; "
        "raise the stage, or choose device none",
    ),
    (
        {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
        [],
        "offload_optimizer.device=cpu needs stage 1 or higher",
    ),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}},
        [],
        "device=nvme needs stage 3, at stage 2 DeepSpeed",
    ),
    (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
        [],
        "offload_param.nvme_path is missing; give a folder",
    ),
    (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}},
        [],
        'offload_param.device is "gpu"; there are none, cpu and nvme',
    ),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        [],
        "ratio=0.5 needs stage 3",
    ),
    (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
        [],
        "super_offload=true is not possible",
    ),
]
