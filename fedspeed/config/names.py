"""What a mistyped key was probably meant to be, and how what earlier versions took is written now."""

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

# What other trainers call what we call otherwise; names alone would not lead from one to the other.
_CALLED_ELSEWHERE = {
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

# Keys of earlier versions, and what to do about them: by the value, where that decides; "" stands for all
# other values.
GONE: dict[str, str | dict[str, str]] = {
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
    """The remedy for an unknown dotted `key`: the likeliest of the known ones, or a list of what exists
    beside it.

    Args:
        value: as it was written; one of earlier versions has a name of today.
    """
    if gone := GONE.get(key):
        return gone if isinstance(gone, str) else gone.get(value, gone[""])
    known = list(known)
    parent, _, name = key.rpartition(".")
    siblings = {_name(k): k for k in known if k.rpartition(".")[0] == parent}
    near_siblings = [siblings[n] for n in difflib.get_close_matches(name, siblings, n=1, cutoff=0.65)]
    same_name_elsewhere = [k for k in known if _name(k) == name]
    near_elsewhere = difflib.get_close_matches(name, [_name(k) for k in known], n=1, cutoff=0.75)
    elsewhere = [k for k in known if k == _CALLED_ELSEWHERE.get(name)]
    likely = elsewhere or near_siblings or same_name_elsewhere
    if likely := likely or [k for k in known if _name(k) in near_elsewhere]:
        return f"did you mean {' or '.join(likely)}?"
    return f"known there: {', '.join(sorted(siblings.values() or known))}"


def _name(key: str) -> str:
    return key.rpartition(".")[2]


def _names(text: str) -> str:
    """Return a list with commas in brackets."""
    return f"[{', '.join(part.strip() for part in text.split(',') if part.strip())}]"


def _numbers(text: str) -> str:
    """Return the same of numbers, empty if some are none."""
    return _names(text) if re.fullmatch(r"[0-9,\s]+", text) else ""


def _table(text: str) -> str:
    """Return `name:steps,name:steps` as a dictionary, empty if it is none."""
    pairs = re.findall(r"([^,:=\s]+)\s*[:=]\s*([0-9]+)", text)
    return f"{{{', '.join(f'{name}: {steps}' for name, steps in pairs)}}}" if pairs else ""


def _blocks(text: str) -> str:
    """Return `last:N`, or numbers and ranges such as `10,12-15`, as they are written today; empty if they are
    neither.
    """
    if last := re.fullmatch(r"\s*last\s*:\s*([0-9]{1,9})\s*", text):
        return f"{{last: {last[1]}}}"
    spans = [re.fullmatch(r"\s*([0-9]{1,4})(?:-([0-9]{1,4}))?\s*", part) for part in text.split(",")]
    if not all(spans):
        return ""
    numbers = [number for span in spans for number in range(int(span[1]), int(span[2] or span[1]) + 1)]
    return f"[{', '.join(map(str, numbers))}]"


# Keys whose text of earlier versions is a list or a dictionary now.
_SPELLED: dict[str, Callable[[str], str]] = {
    "engine.cuts": _numbers,
    "adapter.targets": _names,
    "adapter.blocks": _blocks,
    "train.local_steps_by_cluster": _table,
}


def new_spelling(key: str, text: Any) -> str:
    """Return how a text that stood for a list or a dictionary is written today; empty if it did not."""
    return _SPELLED[key](text) if key in _SPELLED and isinstance(text, str) and text.strip() else ""
