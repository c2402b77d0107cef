"""Remedies for unknown keys, and the current form of keys and values of earlier versions."""

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

# Keys of other trainers whose names are not similar to ours.
_OTHER_TRAINERS = {
    "learning_rate": "train.lr",
    "batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.accumulation",
    "per_device_train_batch_size": "train.micro_batch",
    "epochs": "federation.rounds",
    "num_train_epochs": "federation.rounds",
    "num_rounds": "federation.rounds",
    "max_length": "data.max_tokens",
    "max_seq_length": "data.max_tokens",
    "cutoff_len": "data.max_tokens",
    "num_clients": "data.clients",
    "r": "adapter.lora_rank",
    "rank": "adapter.lora_rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.targets",
    "max_grad_norm": "train.clip",
    "model_name_or_path": "model.base",
    "torch_dtype": "model.dtype",
    "dataset": "data.task",
    "output_dir": "run.out",
}

# Keys of earlier versions and their remedies. Where the remedy depends on the value, it is given by value;
# "" stands for all other values.
FORMER_KEYS: dict[str, str | dict[str, str]] = {
    "cluster.silence_s": "write cluster.heartbeat_timeout_s",
    "engine.seats": "write engine.client_slots",
    "engine.slots": "write engine.block_slots",
    "routing.first_span": "leave it out: the participants of a masked sum agree on its range in every round",
    "federation.aggregation": {
        "avg_factors": "write federation.method.name=lora_average federation.method.rule=avg_factors",
        "freeze_a": "write federation.method.name=lora_average federation.method.rule=freeze_a",
        "alternate": "write federation.method.name=lora_average federation.method.rule=alternate",
        "svd": "write federation.method.name=flexlora",
        "": "write federation.method.name=lora_average federation.method.rule=avg_factors, or another method",
    },
}


def remedy_for_unknown(key: str, known: Iterable[str], value: str = "") -> str:
    """Return the remedy for an unknown dotted `key`.

    It is the current name of a key of an earlier version, else the likeliest of the known keys, else the list
    of the keys of that section.

    Args:
        value: the value that was given, as text.
    """
    if former := FORMER_KEYS.get(key):
        return former if isinstance(former, str) else former.get(value, former[""])
    known = list(known)
    parent, _, name = key.rpartition(".")
    siblings = {_name(k): k for k in known if k.rpartition(".")[0] == parent}
    near_siblings = [siblings[n] for n in difflib.get_close_matches(name, siblings, n=1, cutoff=0.65)]
    same_name = [k for k in known if _name(k) == name]
    near_names = difflib.get_close_matches(name, [_name(k) for k in known], n=1, cutoff=0.75)
    translated = [k for k in known if k == _OTHER_TRAINERS.get(name)]
    likely = translated or near_siblings or same_name
    if likely := likely or [k for k in known if _name(k) in near_names]:
        return f"did you mean {' or '.join(likely)}?"
    return f"known there: {', '.join(sorted(siblings.values() or known))}"


def _name(key: str) -> str:
    return key.rpartition(".")[2]


def _names(text: str) -> str:
    """Return names with commas between them as a YAML list."""
    return f"[{', '.join(part.strip() for part in text.split(',') if part.strip())}]"


def _numbers(text: str) -> str:
    """Return numbers with commas between them as a YAML list; empty if the text is anything else."""
    return _names(text) if re.fullmatch(r"[0-9,\s]+", text) else ""


def _table(text: str) -> str:
    """Return `name:steps,name:steps` as a YAML dictionary; empty if the text is anything else."""
    pairs = re.findall(r"([^,:=\s]+)\s*[:=]\s*([0-9]+)", text)
    return f"{{{', '.join(f'{name}: {steps}' for name, steps in pairs)}}}" if pairs else ""


def _blocks(text: str) -> str:
    """Return `last:N`, or numbers and ranges such as `10,12-15`, as YAML; empty for any other text."""
    if last := re.fullmatch(r"\s*last\s*:\s*([0-9]{1,9})\s*", text):
        return f"{{last: {last[1]}}}"
    numbers: list[int] = []
    for item in text.split(","):
        span = re.fullmatch(r"\s*([0-9]{1,4})(?:-([0-9]{1,4}))?\s*", item)
        if span is None:
            return ""
        numbers += range(int(span[1]), int(span[2] or span[1]) + 1)
    return f"[{', '.join(map(str, numbers))}]"


# Keys that were text in earlier versions and are a list or a dictionary now.
_FORMER_TEXTS: dict[str, Callable[[str], str]] = {
    "engine.cuts": _numbers,
    "adapter.targets": _names,
    "adapter.blocks": _blocks,
    "train.local_steps_by_cluster": _table,
}


def current_spelling(key: str, text: Any) -> str:
    """Return the list or dictionary that a text of an earlier version stood for; empty for other values."""
    if key not in _FORMER_TEXTS or not isinstance(text, str) or not text.strip():
        return ""
    return _FORMER_TEXTS[key](text)
