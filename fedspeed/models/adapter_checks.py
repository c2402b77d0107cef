"""Check the adapter that a run starts from or makes, before anything is started and without torch."""

import difflib
from pathlib import Path

from fedspeed.config.load import DEFAULT, Loaded
from fedspeed.config.spelling import flow
from fedspeed.errors import ModelError
from fedspeed.models import saved_adapter
from fedspeed.models.catalogue import shape_of
from fedspeed.models.checks import local_base
from fedspeed.models.factors import is_factor_a
from fedspeed.models.families.experts import NOT_LINEAR
from fedspeed.models.families.registry import FAMILIES
from fedspeed.models.saved_adapter import WEIGHTS_FILE, check_family, check_modules, read_config
from fedspeed.models.stored import check_types, stored_tensors


def check_adapter(loaded: Loaded) -> list[str]:
    """Check the adapter of a run. Return the lines to print about one that it starts from.

    Raises:
        ModelError: its files are damaged, disagree on the LoRA rank, or contradict the configuration or the
            base; or a new adapter names modules that the base does not have.
    """
    adapter = loaded.config.adapter
    if not adapter.start_from:
        _check_new_targets(loaded)
        return []
    folder = Path(adapter.start_from)
    if not folder.is_dir():
        raise ModelError(
            f"adapter.start_from: {folder} does not exist{loaded.searched('adapter.start_from')}; give a "
            "PEFT folder (adapter_config.json and "
            "adapter_model.safetensors)"
        )
    saved = read_config(folder)
    lora_rank = saved["r"]
    names = stored_tensors(folder, WEIGHTS_FILE)
    check_types(names.items())
    for name, stored in names.items():
        if is_factor_a(name) and stored.shape[0] != lora_rank:
            raise ModelError(
                f"{stored.file}: {name} has shape {stored.shape}, but adapter_config.json says "
                f"r={lora_rank}; the two files "
                "belong to different adapters, export it again"
            )
    for key, ours, name in (("lora_rank", adapter.lora_rank, "r"), ("alpha", adapter.alpha, "lora_alpha")):
        source = loaded.sources[f"adapter.{key}"]
        if source != DEFAULT and ours != saved.get(name):
            raise ModelError(
                f"{source}: adapter.{key}={ours}, but adapter.start_from={folder} has "
                f"{name}={saved.get(name)}; leave "
                f"adapter.{key} out, or start from another adapter"
            )
    if base := local_base(loaded.config):
        shape = shape_of(str(base))
        check_family(folder, saved, loaded.config.model.base, shape.family)
        check_modules(folder, saved, names, loaded.config.model.base, shape)
    _check_targets(loaded, saved.get("target_modules"))
    return [f"adapter  {folder} (r={lora_rank})", *(f"note     {text}" for text in adapter_notes(loaded))]


def adapter_notes(loaded: Loaded) -> list[str]:
    """Return notes on the adapter that a run starts from: whether it names another base than the run's, and
    whether it was trained with another dropout than the default that the run has.
    """
    adapter = loaded.config.adapter
    if not adapter.start_from:
        return []
    folder = Path(adapter.start_from)
    saved = read_config(folder)
    texts = saved_adapter.notes(folder, saved, loaded.config.model.base)
    if loaded.sources["adapter.dropout"] == DEFAULT:
        texts += saved_adapter.dropout_notes(folder, saved, adapter.dropout)
    return texts


def _check_new_targets(loaded: Loaded) -> None:
    """Raise ModelError where a new adapter's targets do not end in names of modules that the base has."""
    config = loaded.config
    base = local_base(loaded.config)
    if base is None:
        return
    shape = shape_of(str(base))
    FAMILIES[shape.family].check_trained(config.adapter.method)
    if config.adapter.method != "lora" or config.adapter.targets in ("attention", "all-linear"):
        return
    known = [*shape.linear_names, *FAMILIES[shape.family].outside_blocks]
    asked = config.adapter.targets
    if unknown := [name for name in asked if name.rpartition(".")[2] not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise ModelError(
            f"{loaded.sources['adapter.targets']}: adapter.targets={flow(asked)}: {base} ({shape.family}) "
            "has no "
            f"{', '.join(unknown)}{f' (did you mean {near[0]}?)' if near else ''}; it has "
            f"{', '.join(known)}{f' ({NOT_LINEAR})' if shape.experts else ''}. Or write attention or "
            "all-linear"
        )


def _check_targets(loaded: Loaded, saved: object) -> None:
    """Raise ModelError where the configuration names other targets than the adapter that the run starts from.
    PEFT may save whole paths, so the last parts of the names are compared.
    """
    adapter = loaded.config.adapter
    source = loaded.sources["adapter.targets"]
    base = local_base(loaded.config)
    if source == DEFAULT or not isinstance(saved, list) or base is None:
        return
    shape = shape_of(str(base))
    ours = adapter.targets
    if isinstance(ours, str):
        ours = shape.attention_targets if ours == "attention" else shape.linear_names
    there = {str(name).rpartition(".")[2] for name in saved}
    if {name.rpartition(".")[2] for name in ours} != there:
        raise ModelError(
            f"{source}: adapter.targets={flow(adapter.targets)}, but "
            f"adapter.start_from={adapter.start_from} is on "
            f"{flow(sorted(there))}; leave adapter.targets out, or start from another adapter"
        )
