"""Resolve the values `auto` of a DeepSpeed configuration that depend on the model or on the rank's disk."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedspeed.config.deepspeed_schema import HARMLESS_AUTOS
from fedspeed.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

THRESHOLD = "stage3_param_persistence_threshold"


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model, in elements.

    Attributes:
        hidden: width of the hidden states.
        block: parameters of a decoder block.
        trainable: trainable parameters.
        largest: the largest parameter.
    """

    hidden: int
    block: int
    trainable: int
    largest: int


def model_facts(model: "PreTrainedModel") -> ModelFacts:
    """Return the sizes of a model, which may be on the meta device."""
    from fedspeed.models.blocks import decoder_blocks

    return ModelFacts(
        hidden=model.config.hidden_size,
        block=sum(p.numel() for p in decoder_blocks(model)[0].parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        largest=max(p.numel() for p in model.parameters()),
    )


def resolve_autos(config: dict, facts: ModelFacts, nvme: Path, shared_base: bool) -> dict:
    """Return a copy of a DeepSpeed section in which no value is `auto`.

    DeepSpeed allocates a whole reduce bucket, so it is no larger than the trainable part. Two to three blocks
    are gathered at a time. Only vectors and other small tensors stay resident (DeepSpeed's own threshold of
    1e5 elements would include the attention matrices of a small model).

    Where ranks share the base, no parameter may stay resident between two passes: DeepSpeed groups its
    gathers by what is resident, and that changes with every optimizer step. Ranks that share the base take
    steps at different moments, so their gathers would not match.

    Args:
        nvme: a folder of this rank alone: DeepSpeed empties it at the start, and names files by the rank in
            the cluster's world.
        shared_base: whether the frozen base is partitioned over ranks that take steps at different moments.

    Raises:
        ConfigError: a value is not allowed with a shared base.
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
            "the base, no parameter may stay resident; set it to 0 or auto, or set "
            "engine.base_partition=client"
        )
    for offload in (zero.get("offload_param"), zero.get("offload_optimizer")):
        if offload and (path := offload.get("nvme_path")):
            # A path from the configuration is common to the ranks of a host, and DeepSpeed empties its
            # folders.
            offload["nvme_path"] = str(nvme if path == "auto" else Path(path) / nvme.name)
    buffers = zero.get("offload_param") or {}
    if buffers.get("buffer_size") == "auto":
        # A buffer has room for a whole partition of a parameter. DeepSpeed's 1e8 is too small for some.
        buffers["buffer_size"] = facts.largest
    if buffers.get("buffer_count") == "auto":
        del buffers["buffer_count"]  # DeepSpeed has a default
    config["managed_gradient_accumulation"] = False  # the engine decides when a local step ends
    left = [k for k, v in _flat(config) if v == "auto" and k not in HARMLESS_AUTOS]
    assert not left, f"auto was not resolved: {left}"
    return config


def _flat(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield (dotted key, value) of all leaves of a section."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
