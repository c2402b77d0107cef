"""Rules about the execution: tiers of the base, arithmetic, pipelines."""

from collections.abc import Iterator

from fedspeed.config.rules.conflict import Conflict
from fedspeed.config.run import RunConfig
from fedspeed.config.spelling import flow
from fedspeed.schedule.limits import QUANTISED

# Values of engine.matmul and the only model.dtype whose products each changes.
MATMUL_TYPES = {"fp16_accumulation": "fp16", "tf32": "fp32"}


def check_engine(config: RunConfig) -> Iterator[Conflict]:
    if config.engine.base_gib and config.engine.tier in ("stock", "resident", *QUANTISED):
        yield Conflict(
            ("engine.base_gib", "engine.tier"),
            f"engine.base_gib={config.engine.base_gib:g} bounds the device memory of a streamed "
            f"base, but engine.tier={config.engine.tier} does not stream it; leave one of them out",
        )
    if config.engine.base_gib and config.engine.resident_blocks:
        yield Conflict(
            ("engine.base_gib", "engine.resident_blocks"),
            f"engine.base_gib={config.engine.base_gib} and engine.resident_blocks="
            f"{config.engine.resident_blocks} both divide the base's memory between block "
            "slots and resident blocks; set one of them, the second with engine.block_slots",
        )
    wanted = MATMUL_TYPES.get(config.engine.matmul)
    if wanted and config.model.dtype not in (wanted, "auto"):
        yield Conflict(
            ("engine.matmul", "model.dtype"),
            f"engine.matmul={config.engine.matmul} changes products of {wanted} numbers, but "
            f"the run computes in model.dtype={config.model.dtype}; set engine.matmul=default, or "
            f"model.dtype={wanted}",
        )


def check_pipeline(config: RunConfig) -> Iterator[Conflict]:
    scope = config.engine.pipeline
    if scope == "none":
        if config.engine.cuts != "auto":
            yield Conflict(
                ("engine.cuts", "engine.pipeline"),
                f"engine.cuts={flow(config.engine.cuts)} divides the stages of a pipeline, but "
                "engine.pipeline=none; set engine.pipeline=client, or leave engine.cuts out",
            )
        return
    if config.adapter.method != "lora":
        yield Conflict(
            ("engine.pipeline", "adapter.method"),
            f"engine.pipeline={scope} trains LoRA in every stage, but adapter.method="
            f"{config.adapter.method}; choose adapter.method=lora, or engine.pipeline=none",
        )
    if config.engine.base_reads != "gather":
        yield Conflict(
            ("engine.pipeline", "engine.base_reads"),
            f"engine.base_reads={config.engine.base_reads} reads blocks of the base from other ranks, "
            f"but with engine.pipeline={scope} every rank has the blocks of its stage; leave it out",
        )
    if config.engine.tier in ("ram", "nvme") and config.engine.cuts != "auto":
        yield Conflict(
            ("engine.cuts", "engine.tier"),
            f"engine.cuts={flow(config.engine.cuts)} divides resident stages, but "
            f"engine.tier={config.engine.tier} assigns chunks of blocks to the ranks in turn; leave "
            "engine.cuts out",
        )
    if scope == "client":
        return
    if config.federation.local_optimizer == "keep":
        yield Conflict(
            ("engine.pipeline", "federation.local_optimizer"),
            "federation.local_optimizer=keep would move every client's optimizer state over "
            "all ranks of the cluster in each round, which engine.pipeline=cluster does not support; set "
            "federation.local_optimizer=reset, or engine.pipeline=client",
        )
    if config.engine.tier not in ("auto", "resident"):
        yield Conflict(
            ("engine.pipeline", "engine.tier"),
            f"engine.tier={config.engine.tier} loads blocks, but with engine.pipeline=cluster "
            "the blocks of a stage are resident; set engine.tier=resident, or engine.pipeline=client",
        )
