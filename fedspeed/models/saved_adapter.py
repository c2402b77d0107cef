"""The PEFT adapter that a run starts from: whether FedSpeed can train what its adapter_config.json describes,
and whether it belongs to the base of this run. Reads JSON only; `adapter_keys` compares
its tensors with the model.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedspeed.errors import ModelError
from fedspeed.files import json_value
from fedspeed.models import file_digests
from fedspeed.models.catalogue import KNOWN
from fedspeed.models.config import AdapterConfig
from fedspeed.models.families.registry import FAMILIES
from fedspeed.models.families.shape import ModelShape
from fedspeed.models.json_object import read_object
from fedspeed.models.local_config import config_file
from fedspeed.models.stored import stored_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in that file
MERGE = (
    "merge the adapter into its base (PEFT: merge_and_unload(), then save_pretrained) and give that folder "
    "as model.base"
)
CONVERT = (
    "convert it where it was trained (PEFT: save_pretrained(FOLDER, "
    "path_initial_model_for_weight_conversion=INITIAL_ADAPTER)), or " + MERGE
)
# Keys of a LoRA with A and B alone. Others are reported, since a newer PEFT may give them a meaning.
_PLAIN = frozenset((
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "use_rslora",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
    "lora_bias",
))
_MAX_NUMBER = 1e9  # neither a rank nor alpha is as large, and no infinity
_ARTICLE = {str: "a str", int: "an int"}
_OF_ONE_SITE = ("base_model_name_or_path", "revision")
# Key -> what an adapter with it is, which cannot be trained here.
_REFUSED = {
    "use_dora": "is DoRA, which also trains a magnitude for every row of a matrix",
    "trainable_token_indices": "also trains single rows of the embedding",
    "modules_to_save": "also trains whole modules of the base",
    "bias": "also trains biases of the base",
    "rank_pattern": "gives some matrices a rank of their own",
    "alpha_pattern": "gives some matrices an alpha of their own",
    "target_parameters": "is on parameters that are no matrix of a linear module",
    "layer_replication": "repeats blocks of its base",
} | dict.fromkeys(
    (
        "use_qalora",
        "velora_config",
        "monteclora_config",
        "kasa_config",
        "use_bdlora",
        "arrow_config",
        "alora_invocation_tokens",
        "megatron_config",
        "ensure_weight_tying",
    ),
    "is a variant of LoRA with an arithmetic of its own",
)
# Methods of initialising A and B that do not change the base. They do not matter once A and B are read from
# the file.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_MODULE = re.compile(r"\w+(\.\w+)*")  # a module's name, or the end of it
_BASE_CHANGED = re.compile(r"pissa|olora|corda|loftq|lora_ga")
_FAMILY_OF_CLASS = {family.architecture: family.model_type for family in FAMILIES.values()}


def read_config(folder: Path) -> dict:
    """Return the values of a folder's adapter_config.json, of a LoRA that can be trained further as it is.

    Raises:
        ModelError: no such file, no LoRA, or one with more than A, B and B's bias.
    """
    path = folder / CONFIG_FILE
    saved = read_object(path, "an adapter configuration")
    kind = saved.get("peft_type")
    if kind != "LORA":
        raise ModelError(
            f"{path}: peft_type={kind} is no LoRA, and FedSpeed starts from LoRA adapters; {MERGE}"
        )
    for key, reason in _REFUSED.items():
        if (value := saved.get(key)) and value != "none":
            raise ModelError(
                f"{path}: {key}={json.dumps(value)} {reason}; FedSpeed trains LoRA's A and B only. Start "
                f"from an adapter without it, or {MERGE}"
            )
    _check_start(path, saved.get("init_lora_weights", True))
    if saved.get("task_type") not in (None, "CAUSAL_LM"):
        raise ModelError(
            f"{path}: task_type={saved['task_type']} is not an adapter of a causal language model; start "
            "from one with task_type=CAUSAL_LM"
        )
    for key, kinds, what in (
        ("r", int, "a whole number above 0"),
        ("lora_alpha", int | float, "a number above 0"),
    ):
        value = saved.get(key)
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < _MAX_NUMBER:
            raise ModelError(
                f"{path}: {key} is {json.dumps(value)}, but must be {what}; copy the folder again"
            )
    targets = saved.get("target_modules")
    if not targets or not (
        isinstance(targets, str)
        or (isinstance(targets, list) and all(isinstance(name, str) for name in targets))
    ):
        raise ModelError(
            f"{path}: target_modules is {json.dumps(targets)}, but must name modules; copy the folder again"
        )
    for key, item in (("exclude_modules", str), ("layers_pattern", str), ("layers_to_transform", int)):
        value = saved.get(key)
        items = value if isinstance(value, list) else [value]
        if value is not None and not all(type(one) is item for one in items):
            raise ModelError(
                f"{path}: {key} is {json.dumps(value)}, but must be {_ARTICLE[item]} or a list of some; "
                "copy the folder again"
            )
    return saved


def has_patterns(saved: Mapping) -> bool:
    """Return whether an adapter chooses its modules by regular expressions. PEFT would evaluate them, and
    some take longer than anybody can wait.

    Args:
        saved: values of `read_config`.
    """
    targets = saved["target_modules"]
    layers = saved.get("layers_pattern") or []
    return (
        (isinstance(targets, str) and targets.lower() != "all-linear")
        or bool(saved.get("exclude_modules") and isinstance(saved["exclude_modules"], str))
        or not all(_MODULE.fullmatch(one) for one in ([layers] if isinstance(layers, str) else layers))
    )


def config_digest(folder: Path) -> str:
    """Return a digest of what a folder's adapter_config.json says of the adapter. The name of the base, which
    each site may have in another place, and the order of the modules do not count.

    Raises:
        ModelError: as of `read_config`.
    """
    values = {key: value for key, value in read_config(folder).items() if key not in _OF_ONE_SITE}
    if isinstance(values["target_modules"], list):
        values["target_modules"] = sorted(values["target_modules"])
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def adapted_modules(folder: Path) -> list[str]:
    """Return the names of the modules whose factors an adapter's file holds.

    Raises:
        ModelError: the file is missing or damaged, or holds no factor.
    """
    names = stored_tensors(folder, WEIGHTS_FILE)
    found = {name.partition(".lora_")[0].removeprefix(PREFIX) for name in names if ".lora_" in name}
    if not found:
        raise ModelError(f"{folder / WEIGHTS_FILE}: holds no factor of a LoRA; copy the folder again")
    return sorted(found)


def _check_start(path: Path, start: object) -> None:
    """Raise ModelError unless A and B belong to the base's own weights: some methods of initialisation
    subtract the first product of A and B from the base whenever it is loaded.
    """
    if start in _STARTS:
        return
    if isinstance(start, str) and _BASE_CHANGED.match(start.lower()):
        raise ModelError(
            f"{path}: init_lora_weights={start} means that A and B belong to a base from which their "
            "first product was taken; "
            f"FedSpeed trains on the base as it is. So {CONVERT}"
        )
    if start == "mica":
        raise ModelError(
            f"{path}: init_lora_weights=mica keeps B as it was drawn, FedSpeed would train it too; write "
            "init_lora_weights=true into the file "
            "if that is meant"
        )
    raise ModelError(
        f"{path}: init_lora_weights={json.dumps(start)} is unknown, and so is what it did to the "
        f"base; {MERGE}"
    )


def check_modules(folder: Path, saved: Mapping, names: Iterable[str], base: str, shape: ModelShape) -> None:
    """Check that the modules that an adapter changes are modules of this family.

    Args:
        names: of the tensors in the adapter's file. base: the base of this run, for the message.

    Raises:
        ModelError: they are another family's.
    """
    adapted = {name.partition(".lora_")[0].rpartition(".")[2] for name in names if ".lora_" in name}
    outside = FAMILIES[shape.family].outside_blocks
    if strange := sorted(adapted - {*shape.linear_names, *outside}):
        raise ModelError(
            f"adapter.start_from={folder}: is on {', '.join(strange)}, but a block of model.base={base} "
            f"({shape.family}) has "
            f"{shape.linears_text}; the adapter belongs to another base{_named(saved)}"
        )


def outside_blocks(adapter: AdapterConfig) -> str:
    """Return a target of an adapter that is an embedding or the head; empty if it has none."""
    targets: object = [adapter.targets] if isinstance(adapter.targets, str) else list(adapter.targets)
    if adapter.start_from:
        folder = Path(adapter.start_from)
        saved = read_config(folder)
        targets = adapted_modules(folder) if has_patterns(saved) else saved["target_modules"]
    outside = {name for family in FAMILIES.values() for name in family.outside_blocks}
    leaves = [name.rpartition(".")[2] for name in targets] if isinstance(targets, list) else []
    return next((name for name in leaves if name in outside), "") if adapter.method == "lora" else ""


def _named(saved: Mapping) -> str:
    """Return what an adapter says of its base, for a message."""
    named = saved.get("base_model_name_or_path")
    return f" (its base_model_name_or_path is {named})" if named else ""


def check_family(folder: Path, saved: Mapping, base: str, family: str) -> None:
    """Check that the adapter was trained on a base of this family, as far as the adapter says so or its base
    can be looked up without a network.

    Raises:
        ModelError: it was trained on another.
    """
    mapping = saved.get("auto_mapping")
    of_class = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    theirs = _FAMILY_OF_CLASS.get(str(of_class), of_class) or _family_of(
        str(saved.get("base_model_name_or_path") or "")
    )
    if theirs and theirs != family:
        raise ModelError(
            f"adapter.start_from={folder}: was trained on a {theirs}{_named(saved)}, but model.base={base} "
            f"is a {family}; give the base "
            "that the adapter belongs to"
        )


def _family_of(named: str) -> str | None:
    """Return the model_type of a base that an adapter names; None if the base is not on this machine."""
    if named in KNOWN:
        return KNOWN[named].family
    path = config_file(named) if named else None
    try:
        values = json_value(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return None
    return values.get("model_type") if isinstance(values, dict) else None


def notes(folder: Path, saved: Mapping, base: str) -> list[str]:
    """Return notes on what does not keep a run from starting: another name of its base, and unknown keys."""
    texts = []
    named = saved.get("base_model_name_or_path")
    if named and not _same(str(named), base):
        texts.append(
            f"adapter.start_from={folder}: was trained on {named}, but model.base is {base}; it belongs "
            "there only if both are the same weights"
        )
    if has_patterns(saved):
        texts.append(
            f"{folder / CONFIG_FILE}: chooses modules by a regular expression, which is not evaluated: the "
            f"adapter is on the modules that {WEIGHTS_FILE} holds"
        )
    if unknown := sorted(
        key for key, value in saved.items() if key not in _PLAIN and key not in _REFUSED and value
    ):
        texts.append(
            f"{folder / CONFIG_FILE}: {', '.join(unknown)}: not known to this version, and passed over, as "
            "PEFT does"
        )
    return texts


def dropout_notes(folder: Path, saved: Mapping, dropout: float) -> list[str]:
    """Return notes where the run would train an adapter with another dropout than it was trained with.

    Args:
        dropout: of the run, whose configuration does not name one.
    """
    earlier = saved.get("lora_dropout") or 0.0
    if earlier == dropout:
        return []
    return [
        f"adapter.start_from={folder}: was trained with lora_dropout={json.dumps(earlier)}, and goes on with "
        f"adapter.dropout={dropout:g}, the default; name adapter.dropout to have another"
    ]


def _same(one: str, other: str) -> bool:
    """Tell whether two names probably mean one base. Two folders on this machine must be the same, or have
    equal configurations and weights. Otherwise the last part of the name decides, whether it is a hub name,
    a path on another machine or a snapshot in the hub's cache.
    """
    first = Path(one)
    second = Path(other)
    if first.is_dir() and second.is_dir():
        return first.samefile(second) or _outline(first) == _outline(second)
    return _last(one) == _last(other)


def _outline(folder: Path) -> tuple[str, str]:
    return file_digests.config_digest(folder / "config.json"), file_digests.weights_digest(folder)


def _last(name: str) -> str:
    cached = re.search(r"models--[^/]*--([^/]+)", name)
    return (cached[1] if cached else name.rstrip("/").rpartition("/")[2]).lower()
