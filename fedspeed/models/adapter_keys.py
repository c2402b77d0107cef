"""Whether an adapter's file holds exactly what the model has a place for. What `PeftModel.from_pretrained`
would drop or fill up by itself is refused: losses would silently be others than those the adapter had.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from fedspeed.errors import ModelError
from fedspeed.models.saved_adapter import CONFIG_FILE, MERGE, WEIGHTS_FILE


class Reader(Protocol):
    """The tensors of a folder (models.loading.WeightFiles)."""

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, shape: torch.Size) -> torch.Tensor: ...


def check_keys(
    folder: Path,
    saved: Reader,
    wanted: dict[str, torch.Size],
    places: dict[str, list[str]],
    base: Reader | None,
) -> None:
    """Compare an adapter's file with the model.

    Args:
        wanted: name in the file -> shape, of every trainable tensor of the model.
        places: parameter of the base -> all names that it has in the base's files (two if it is tied).
        base: where the base's weights come from; None if they are drawn.

    Raises:
        ModelError: the file lacks a tensor, has one of another shape, or one without a place.
    """
    there = saved.names()
    if missing := sorted(wanted.keys() - there):
        raise ModelError(
            f"{folder / WEIGHTS_FILE}: lacks {_listed(missing)}, which {CONFIG_FILE} asks for beside this "
            "base; the adapter belongs to another "
            "base, or its two files to different adapters"
        )
    for name, shape in sorted(wanted.items()):
        if saved.shape(name) != tuple(shape):
            raise ModelError(
                f"{folder / WEIGHTS_FILE}: {name} has shape {saved.shape(name)}, but this base asks for "
                f"{tuple(shape)}; the adapter belongs to "
                "another base"
            )
    extra = sorted(there - wanted.keys())
    copies = {name: file_names for name in extra if (file_names := places.get(_in_base(name)))}
    if strange := [name for name in extra if name not in copies]:
        raise ModelError(
            f"{folder / WEIGHTS_FILE}: holds {_listed(strange)}, for which {CONFIG_FILE} and this base have "
            "no place, so that it would be "
            "dropped; name its module in target_modules, give the base that the adapter belongs to, or "
            "export it again"
        )
    if changed := [
        name
        for name, file_names in copies.items()
        if base is None or not _equal(saved, name, base, file_names)
    ]:
        raise ModelError(
            f"{folder / WEIGHTS_FILE}: holds {_listed(changed)}, other than in model.base: the base was "
            "changed (a vocabulary resized, an "
            "embedding trained) before the adapter was saved. Save that base with its new weights (PEFT: "
            "load the adapter, unload(), "
            f"save_pretrained) and give it as model.base, or {MERGE}"
        )


def _equal(saved: Reader, name: str, base: Reader, names: Iterable[str]) -> bool:
    """Whether a tensor is the base's own, in whichever of their two types is the shorter one."""
    own = next((n for n in names if n in base.names()), None)
    if own is None or saved.shape(name) != base.shape(own):
        return False
    size = torch.Size(saved.shape(name))
    mine = base.read(own, size)
    theirs = saved.read(name, size)
    return torch.equal(mine.to(theirs.dtype), theirs) or torch.equal(theirs.to(mine.dtype), mine)


def _in_base(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def places_of(model: nn.Module, prefix: str) -> dict[str, list[str]]:
    """Name of every parameter of the base -> all names it may have in the base's files.

    Args:
        model: with its adapter. prefix: of the decoder's names, which older files leave out.
    """
    named: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if ".lora_" not in name:
            named.setdefault(parameter, []).append(_in_base(name))
    return {
        name: [alias for one in names for alias in (one, one.removeprefix(prefix))]
        for names in named.values()
        for name in names
    }
