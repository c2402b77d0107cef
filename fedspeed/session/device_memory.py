"""Detection of exhausted device memory, and the settings that make a step need less of it."""

from collections.abc import Iterator

from fedspeed.config.run import RunConfig
from fedspeed.planner.plan import SLOTTED
from fedspeed.schedule.limits import QUANTISED

MESSAGES = (  # of CUDA, cuBLAS and HIP
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "HIP out of memory",
)


def out_of_device_memory(error: BaseException) -> bool:
    """Return whether an error of torch's allocator, CUDA or cuBLAS means that device memory is exhausted."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MESSAGES)


def device_memory_text(error: BaseException, who: str, config: RunConfig, tier: str) -> str:
    """Return the message for exhausted device memory, with settings that reduce it, the mildest first.

    Args:
        who: the rank and its clients.
        tier: what engine.tier resolves to; empty for a pipeline.
    """
    said = (str(error).splitlines() or [type(error).__name__])[0]
    said = said.partition(" Including non-PyTorch memory")[0].rstrip(".")
    remedies = [*(_layer_by_layer(config, tier) if tier not in ("", "stock") else ()), *_step(config, tier)]
    return (
        f"{who}: the GPU's memory is full ({said}). Set one or more of these, the mildest first: "
        f"{', '.join(remedies)}. `fedspeed plan --config FILE --hostfile FILE` says what fits on which "
        "card, and what each setting takes; another program on the card takes of it too (nvidia-smi). "
        "If only engine.activation_gib, block_inputs, base_gib and block_slots change, the run "
        "resumes from its journal with the same results; other changes need a new run "
        "(run.name=NAME or --fresh)"
    )


def _layer_by_layer(config: RunConfig, tier: str) -> Iterator[str]:
    """Yield settings of layer-major execution that reduce memory and keep the results."""
    engine = config.engine
    if engine.activation_gib != 0:
        yield "engine.activation_gib=0"
    if engine.block_inputs != "host":
        yield "engine.block_inputs=host"
    if tier not in SLOTTED:
        return
    if engine.base_gib:
        yield f"engine.base_gib={engine.base_gib / 2:g}"
    elif engine.block_slots > 2:
        yield "engine.block_slots=2"


def _step(config: RunConfig, tier: str) -> Iterator[str]:
    """Yield settings of a step that reduce memory under any execution."""
    train = config.train
    engine = config.engine
    stock = tier in ("", "stock")
    if stock and not engine.activation_checkpointing:
        yield "engine.activation_checkpointing=true"
    if train.micro_batch > 1:
        whole = train.micro_batch % 2 == 0
        same = f" with train.accumulation={train.accumulation * 2} (the same step)" if whole else ""
        yield f"train.micro_batch={train.micro_batch // 2}{same}"
    if not stock and engine.client_slots != 1:
        yield "engine.client_slots=1"
    if tier in ("stock", "resident", *QUANTISED) and config.adapter.method != "full":
        yield "engine.tier=ram"
    yield f"data.max_tokens={max(1, config.data.max_tokens // 2)} (shorter rows)"
