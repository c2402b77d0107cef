"""What a mistyped key was probably meant to be."""

import difflib
from collections.abc import Iterable

# What other trainers call what we call otherwise; names alone would not lead from one to the other.
_CALLED_ELSEWHERE = {
    "learning_rate": "train.lr", "batch_size": "train.micro_batch", "gradient_accumulation_steps": "train.accumulation",
    "per_device_train_batch_size": "train.micro_batch", "epochs": "federation.rounds", "num_train_epochs": "federation.rounds",
    "num_rounds": "federation.rounds", "max_length": "data.max_tokens", "max_seq_length": "data.max_tokens",
    "cutoff_len": "data.max_tokens", "num_clients": "data.clients", "r": "adapter.lora_rank", "rank": "adapter.lora_rank",
    "lora_alpha": "adapter.alpha", "lora_dropout": "adapter.dropout", "target_modules": "adapter.targets",
    "max_grad_norm": "train.clip", "model_name_or_path": "model.base", "torch_dtype": "model.dtype",
    "dataset": "data.task", "output_dir": "run.out",
}

# Keys of earlier versions, and what to do about them.
GONE = {"routing.first_span": "leave it out: the participants of a masked sum agree on its range in every round"}


def remedy_for_unknown(key: str, known: Iterable[str]) -> str:
    """The remedy for an unknown dotted `key`: the likeliest of the known ones, or a list of what exists beside it."""
    if key in GONE:
        return GONE[key]
    known = list(known)
    parent, _, name = key.rpartition(".")
    siblings = {_name(k): k for k in known if k.rpartition(".")[0] == parent}
    near_siblings = [siblings[n] for n in difflib.get_close_matches(name, siblings, n=1, cutoff=0.65)]
    same_name_elsewhere = [k for k in known if _name(k) == name]
    near_elsewhere = difflib.get_close_matches(name, [_name(k) for k in known], n=1, cutoff=0.75)
    elsewhere = [k for k in known if k == _CALLED_ELSEWHERE.get(name)]
    likely = elsewhere or near_siblings or same_name_elsewhere or [k for k in known if _name(k) in near_elsewhere]
    if likely:
        return f"did you mean {' or '.join(likely)}?"
    return f"known there: {', '.join(sorted(siblings.values() or known))}"


def _name(key: str) -> str:
    return key.rpartition(".")[2]
