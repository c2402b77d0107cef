"""The last `auto`s of a DeepSpeed configuration: those that only the model and the rank's own disk can answer."""

import copy
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelFacts:
    """Sizes in elements."""

    hidden: int
    block: int
    trainable: int


def model_facts(model) -> ModelFacts:
    from fedspeed.models.blocks import decoder_blocks

    return ModelFacts(hidden=model.config.hidden_size, block=sum(p.numel() for p in decoder_blocks(model)[0].parameters()),
                      trainable=sum(p.numel() for p in model.parameters() if p.requires_grad))


def finish(config: dict, facts: ModelFacts, nvme: Path) -> dict:
    """A copy of `config` without `auto`.

    The bucket is allocated in full, so it is no larger than the trainable part needs. Two to three blocks live at a time; only vectors
    and the like stay resident (DeepSpeed's own threshold of 1e5 elements calls every attention matrix of a small model small).

    Args:
        nvme: a folder of this rank alone: DeepSpeed empties it at the start and names its files by the rank in the cluster's world.
    """
    config = copy.deepcopy(config)
    zero = config.setdefault("zero_optimization", {})
    answers = {
        "reduce_bucket_size": max(1, min(facts.trainable, 2_000_000)),
        "allgather_bucket_size": max(1, min(facts.trainable, 2_000_000)),
        "stage3_prefetch_bucket_size": facts.block,
        "stage3_max_live_parameters": 3 * facts.block,
        "stage3_max_reuse_distance": facts.block,
        "stage3_param_persistence_threshold": 4 * facts.hidden,
        "sub_group_size": 1_000_000_000,
    }
    for key, value in answers.items():
        if zero.get(key) == "auto":
            zero[key] = value
    for block in (zero.get("offload_param"), zero.get("offload_optimizer")):
        if block and block.get("nvme_path") == "auto":
            block["nvme_path"] = str(nvme)
    config["managed_gradient_accumulation"] = False  # a local step ends where we say, not after a fixed count
    left = [k for k, v in _flat(config) if v == "auto"]
    assert not left, f"auto without an answer: {left}"
    return config


def _flat(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
