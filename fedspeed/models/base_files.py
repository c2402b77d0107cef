"""How the tensors in a base's files fit the model that its config.json describes: which are used, whether the
head is the embedding, and what is to be said about the rest. From headers; only where config.json ties the
head, and the files hold one, are bytes compared.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fedspeed.errors import ModelError
from fedspeed.models.catalogue import shape_of
from fedspeed.models.families.base import Family, Shape
from fedspeed.models.families.registry import FAMILIES
from fedspeed.models.families.shape import ModelShape
from fedspeed.models.stored import FLOATS, Stored, check_types, key_of, same_bytes, stored_tensors

# Tables that older files hold although every library computes them: masks and rotary frequencies.
COMPUTED = re.compile(r"(^|\.)((attn|attention)\.(bias|masked_bias)|(rotary_emb\.)?inv_freq|position_ids)$")
NAMES_SHOWN = 5


@dataclass(frozen=True)
class Fit:
    """Where a model's parameters are among the tensors of the files.

    Args:
        keys: parameter's name -> its name in the files; several names where the files divide its rows among
            several matrices.
        unused: names in the files for which the model has no place.
    """

    keys: dict[str, tuple[str, ...]]
    unused: tuple[str, ...]


def head_is_embedding(stored: Mapping[str, Stored], family: Family, config_ties: bool) -> bool:
    """Whether one tensor is embedding and head, as transformers decides it: not where the files hold two that
    differ, whatever config.json says, and always where it says so and they hold one of them only.
    """
    if not config_ties:
        return False
    embedding = _stored_name(family.embedding, stored, family)
    head = _stored_name(family.head, stored, family)
    return embedding is None or head is None or same_bytes(stored[embedding], stored[head])


def fit(stored: Mapping[str, Stored], shapes: Mapping[str, Shape], family: Family, where: Path) -> Fit:
    """Find every parameter among the tensors of a base.

    Args:
        shapes: of the model's parameters by name, without the head where it is the embedding.
        where: the folder, for messages.

    Raises:
        ModelError: a parameter is not there, has another shape, or is stored in a type that is no plain
        number.
    """
    head = family.head
    tensors = {name: _tensors_of(name, shape, stored, family) for name, shape in shapes.items()}
    head_key = _stored_name(head, stored, family)
    if head_key and head not in shapes and not tensors[family.embedding].keys() <= stored.keys():
        tensors[family.embedding] = {head_key: shapes[family.embedding]}
    expected = {key: (name, shape) for name, found in tensors.items() for key, shape in found.items()}
    for key, (name, _) in expected.items():
        if key not in stored:
            tie = "; if the head is the embedding, set tie_word_embeddings to true in config.json"
            raise ModelError(
                f"{where}: no weight named {key}; the files belong to another architecture than "
                f"config.json{tie if name == head else ''}"
            )
    check_types((key, stored[key]) for key in expected)
    for key, (_, shape) in expected.items():
        if stored[key].shape != tuple(shape):
            raise ModelError(
                f"{stored[key].file}: {key} has shape {stored[key].shape}, config.json asks for "
                f"{tuple(shape)}"
            )
    used = {*expected, head_key}
    unused = tuple(sorted(key for key in stored if key not in used and not COMPUTED.search(key)))
    return Fit({name: tuple(found) for name, found in tensors.items()}, unused)


def _tensors_of(name: str, shape: Shape, stored: Mapping[str, Stored], family: Family) -> dict[str, Shape]:
    """Return the name and the shape of each tensor of the files that holds a part of a parameter, in the
    order of the parts. A tensor that is not there has the name that it should have.
    """
    key = _stored_name(name, stored, family)
    if key is not None:
        return {key: shape}
    matrices, each = family.matrices_of(name, shape)
    found = {key_of(matrix, stored, family.decoder) or matrix: each for matrix in matrices}
    return found or {name: shape}


def _stored_name(name: str, stored: Mapping[str, Stored], family: Family) -> str | None:
    """Return the name that a parameter has in the files; None if it is not there."""
    aliases = (name, *(other for parameter, other in family.stored_as if parameter == name))
    found = (key_of(alias, stored, family.decoder) for alias in aliases)
    return next((key for key in found if key is not None), None)


def base_shape(folder: Path, pretrained: bool = True) -> ModelShape:
    """Return the dimensions of a local base. Whether its head is tied is decided by its files too.

    Args:
        pretrained: False: the weights are drawn, and those in the folder do not matter.

    Raises:
        ModelError: config.json or the files cannot be read.
    """
    shape = shape_of(str(folder))
    if not (pretrained and shape.tied):
        return shape
    return replace(shape, tied=head_is_embedding(stored_tensors(folder), FAMILIES[shape.family], shape.tied))


def check_base(folder: Path) -> tuple[ModelShape, dict[str, Stored], list[str]]:
    """Check the files of a local pretrained base. Return (dimensions, tensors in the files, notes).

    Raises:
        ModelError: the files do not hold the model that config.json describes.
    """
    stored = stored_tensors(folder)
    config = shape_of(str(folder))
    family = FAMILIES[config.family]
    shape = replace(config, tied=head_is_embedding(stored, family, config.tied))
    fitted = fit(stored, dict(family.parameters(shape)), family, folder)
    return shape, stored, _notes(folder, config, shape, stored, fitted)


def _notes(
    folder: Path, config: ModelShape, shape: ModelShape, stored: Mapping[str, Stored], fitted: Fit
) -> list[str]:
    notes = []
    if config.tied and not shape.tied:
        notes.append(
            f"{folder}: config.json ties the head to the embedding, but the files hold a "
            f"{FAMILIES[shape.family].head} that differs; both are kept apart, as in transformers "
            "(tie_word_embeddings: false in config.json would say so)"
        )
    if fitted.unused:
        count = len(fitted.unused)
        shown = ", ".join(fitted.unused[:NAMES_SHOWN]) + (", ..." if count > NAMES_SHOWN else "")
        what, verb = ("1 tensor has", "is") if count == 1 else (f"{count} tensors have", "are")
        notes.append(f"{folder}: {what} no place in the model of config.json and {verb} not used: {shown}")
    wide = [key for keys in fitted.keys.values() for key in keys if FLOATS[stored[key].dtype] == "fp64"]
    if wide:
        notes.append(
            f"{folder}: weights stored in fp64 ({wide[0]}{', ...' if len(wide) > 1 else ''}) are rounded "
            "to model.dtype"
        )
    return notes
