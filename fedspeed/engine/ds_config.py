"""The last `auto`s of a DeepSpeed configuration: those that only the model and the rank's own disk can
answer.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

from fedspeed.config.deepspeed_schema import HARMLESS_AUTOS
from fedspeed.errors import ConfigError

THRESHOLD = "stage3_param_persistence_threshold"


@dataclass(frozen=True)
class ModelFacts:
    """Sizes in elements."""

    hidden: int
    block: int
    trainable: int
    largest: int  # parameter


def model_facts(model) -> ModelFacts:
    from fedspeed.models.blocks import decoder_blocks

    return ModelFacts(
        hidden=model.config.hidden_size,
        block=sum(p.numel() for p in decoder_blocks(model)[0].parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        largest=max(p.numel() for p in model.parameters()),
    )


def finish(config: dict, facts: ModelFacts, nvme: Path, shared_base: bool) -> dict:
    """A copy of `config` without `auto`.

    The bucket is allocated in full, so it is no larger than the trainable part needs. Two to three blocks
    live at a time; only vectors and the like stay resident (DeepSpeed's own threshold of 1e5 elements calls
    every attention matrix of a small model small).

    Where ranks share the base, nothing may be resident between two passes: DeepSpeed cuts its gathers by what
    is resident and by a count of it that every optimizer step shifts, and ranks in lockstep step and load at
    different moments, so their gathers would not match.

    Args:
        nvme: a folder of this rank alone: DeepSpeed empties it at the start and names its files by the rank
            in the cluster's world.
        shared_base: whether the frozen base is partitioned over ranks that step at different moments.

    Raises:
        ConfigError: a value that the shared base does not allow.
    """
    config = copy.deepcopy(config)
    zero = config.setdefault("zero_optimization", {})
    answers = {
        "reduce_bucket_size": max(1, min(facts.trainable, 2_000_000)),
        "allgather_bucket_size": max(1, min(facts.trainable, 2_000_000)),
        "stage3_prefetch_bucket_size": facts.block,
        "stage3_max_live_parameters": 3 * facts.block,
        "stage3_max_reuse_distance": facts.block,
        THRESHOLD: 0 if shared_base else 4 * facts.hidden,
        "sub_group_size": 1_000_000_000,
    }
    if shared_base:
        zero.setdefault(THRESHOLD, "auto")
    for key, value in answers.items():
        if zero.get(key) == "auto":
            zero[key] = value
    if shared_base and zero[THRESHOLD] != 0:
        raise ConfigError(
            f"deepspeed.zero_optimization.{THRESHOLD}={zero[THRESHOLD]}: where the ranks of a cluster share "
            "the "
            "base, no parameter may stay resident; set it to 0 or auto, or set engine.base_partition=client"
        )
    for block in (zero.get("offload_param"), zero.get("offload_optimizer")):
        if block and block.get(
            "nvme_path"
        ):  # a path of the user's own is shared by the ranks of a host, and DeepSpeed empties its folders
            block["nvme_path"] = str(
                nvme if block["nvme_path"] == "auto" else Path(block["nvme_path"]) / nvme.name
            )
    buffers = zero.get("offload_param") or {}
    if buffers.get("buffer_size") == "auto":
        buffers["buffer_size"] = (
            facts.largest
        )  # a buffer takes a parameter's whole partition; DeepSpeed's 1e8 is too small for some
    if buffers.get("buffer_count") == "auto":
        del buffers["buffer_count"]  # DeepSpeed's own number
    config["managed_gradient_accumulation"] = False  # a local step ends where we say, not after a fixed count
    left = [k for k, v in _flat(config) if v == "auto" and k not in HARMLESS_AUTOS]
    assert not left, f"auto without an answer: {left}"
    return config


def _flat(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
