"""Comparison of an adapter's file with the model. Tensors that `PeftModel.from_pretrained` would drop, or
draw anew, are refused: losses would silently differ from those that the adapter had.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from fedspeed.errors import ModelError
from fedspeed.models.families.base import Family
from fedspeed.models.saved_adapter import CONFIG_FILE, MERGE, WEIGHTS_FILE


class Reader(Protocol):
    """Reads the tensors of a folder (models.loading.WeightFiles)."""

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, shape: torch.Size) -> torch.Tensor: ...


def check_keys(
    folder: Path,
    saved: Reader,
    wanted: dict[str, torch.Size],
    file_names: dict[str, list[str]],
    base: Reader | None,
) -> None:
    """Compare an adapter's file with the model.

    Args:
        wanted: name in the file -> shape, of every trainable tensor of the model.
        file_names: parameter of the base -> all names that it has in the base's files (two if it is tied).
        base: the files of the base; None if its weights are drawn.

    Raises:
        ModelError: the file lacks a tensor, has one of another shape, or one that the model does not have.
    """
    there = saved.names()
    if missing := sorted(wanted.keys() - there):
        raise ModelError(
            f"{folder / WEIGHTS_FILE}: lacks {_listed(missing)}, which {CONFIG_FILE} asks for on this "
            "base; the adapter belongs to another base, or its two files to different adapters"
        )
    for name, shape in sorted(wanted.items()):
        if saved.shape(name) != tuple(shape):
            raise ModelError(
                f"{folder / WEIGHTS_FILE}: {name} has shape {saved.shape(name)}, but this base asks for "
                f"{tuple(shape)}; the adapter belongs to "
                "another base"
            )
    extra = sorted(there - wanted.keys())
    copies = {name: names for name in extra if (names := file_names.get(_in_base(name)))}
    if strange := [name for name in extra if name not in copies]:
        raise ModelError(
            f"{folder / WEIGHTS_FILE}: holds {_listed(strange)}, which {CONFIG_FILE} and this base do not "
            "have, so that it would be dropped; name its module in target_modules, give the base that the "
            "adapter belongs to, or export it again"
        )
    if changed := [
        name for name, names in copies.items() if base is None or not _equal(saved, name, base, names)
    ]:
        raise ModelError(
            f"{folder / WEIGHTS_FILE}: holds {_listed(changed)}, other than in model.base: the base was "
            "changed (a vocabulary resized, an embedding trained) before the adapter was saved. Save that "
            "base with its new weights (PEFT: load the adapter, unload(), save_pretrained) and give it as "
            f"model.base, or {MERGE}"
        )


def _equal(saved: Reader, name: str, base: Reader, names: Iterable[str]) -> bool:
    """Tell whether a tensor equals the base's, compared in the shorter of their two types."""
    file_name = next((n for n in names if n in base.names()), None)
    if file_name is None or saved.shape(name) != base.shape(file_name):
        return False
    size = torch.Size(saved.shape(name))
    original = base.read(file_name, size)
    copy = saved.read(name, size)
    return torch.equal(original.to(copy.dtype), copy) or torch.equal(copy.to(original.dtype), original)


def _in_base(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def names_in_files(model: nn.Module, family: Family) -> dict[str, list[str]]:
    """Return all names that each parameter of the base may have in the base's files.

    Args:
        model: with its adapter.
    """
    named: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if ".lora_" not in name:
            named.setdefault(parameter, []).append(_in_base(name))
    return {
        name: [alias for one in names for alias in _aliases(one, family)]
        for names in named.values()
        for name in names
    }


def _aliases(name: str, family: Family) -> list[str]:
    others = [other for parameter, other in family.stored_as if parameter == name]
    return [name, name.removeprefix(family.decoder), *others]
