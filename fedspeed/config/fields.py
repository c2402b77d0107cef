"""The fields of the configuration dataclasses, and descriptions of the values that each field accepts.

A field holds a scalar, one of a few choices (`Literal`), a list (`tuple[int, ...]`), a dictionary
(`dict[str, int]`), a dataclass, or a union of these. Dataclasses that each have a field `name: Literal[...]`
are the variants of a tagged union: the name selects the variant (`federation.method: {name: flexlora}`).
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Literal

REQUIRED = object()  # stands for the default of a field that has none
BOUNDS = {"min": "at least", "above": "above", "max": "at most", "below": "below"}
_SCALARS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: 'text on one line (write "" for none)',
}
_MANY = {bool: "of true or false", int: "of whole numbers", float: "of numbers", str: "of text"}


@dataclass(frozen=True, eq=False)
class Field:
    """Describe a field of the configuration by its type and its metadata.

    Args:
        type: the annotated type.
        bounds: `min`, `max`, `above` and `below`, as far as the metadata has them. For a list or a
            dictionary they apply to each value.
        help: what the field means.
        path: for a field that names a file or folder to read: the values that name no file, such as `auto`;
            None for all other fields.
        default: the value of a field that is not set; REQUIRED where it must be set.
    """

    type: Any
    bounds: Mapping[str, float]
    help: str = ""
    path: tuple[str, ...] | None = None
    default: Any = REQUIRED

    def of(self, type_: Any) -> "Field":
        """Return a field with the same bounds and another type: a member of the union, or a list item."""
        return Field(type_, self.bounds)

    @property
    def nested(self) -> bool:
        """Return whether the value may be a list, a dictionary or a dataclass."""
        return any(shape_of(alternative) in ("list", "map") for alternative in alternatives(self.type))


def fields_of(cls: type, prefix: str = "") -> tuple[dict[str, Field], list[str]]:
    """Return (dotted key -> field, dotted names of the sections) of a tree of dataclasses.

    Fields of type `dict` are left out, and so are the fields inside a nested value (see `members`).
    """
    fields: dict[str, Field] = {}
    sections: list[str] = []
    for name, field in members(cls).items():
        key = prefix + name
        if is_dataclass_type(field.type) and not variants(field.type):
            inner, deeper = fields_of(field.type, key + ".")
            fields |= inner
            sections += [key, *deeper]
        elif field.type is not dict:
            fields[key] = field
    return fields, sections


def members(cls: type) -> dict[str, Field]:
    """Return the fields of one dataclass by name."""
    hints = typing.get_type_hints(cls)
    return {field.name: _member(field, hints[field.name]) for field in dataclasses.fields(cls)}


def _member(field: dataclasses.Field, type_: Any) -> Field:
    metadata = field.metadata
    default = REQUIRED if field.default is MISSING else field.default
    if field.default_factory is not MISSING:
        default = field.default_factory()
    bounds = {name: metadata[name] for name in BOUNDS if name in metadata}
    return Field(type_, bounds, metadata.get("help", ""), metadata.get("path"), default)


def is_dataclass_type(type_: Any) -> typing.TypeGuard[type]:
    """Return whether a type is a dataclass."""
    return isinstance(type_, type) and dataclasses.is_dataclass(type_)


def alternatives(type_: Any) -> tuple[Any, ...]:
    """Return the members of a union type; for any other type a tuple of that type alone."""
    return typing.get_args(type_) if typing.get_origin(type_) in (typing.Union, types.UnionType) else (type_,)


def choices(type_: Any) -> tuple[str, ...]:
    """Return the choices of a Literal type; empty for any other type."""
    return typing.get_args(type_) if typing.get_origin(type_) is Literal else ()


def item_type(type_: Any) -> Any:
    """Return the type of the items of a list, or of the values of a dictionary; None for any other type."""
    if typing.get_origin(type_) is tuple:
        return typing.get_args(type_)[0]
    return typing.get_args(type_)[1] if typing.get_origin(type_) is dict else None


def shape_of(type_: Any) -> str:
    """Return how values of a type are written in YAML: list, map, word, number or bool."""
    if typing.get_origin(type_) is tuple:
        return "list"
    if typing.get_origin(type_) is dict or is_dataclass_type(type_):
        return "map"
    return {bool: "bool", int: "number", float: "number"}.get(type_, "word")


def variants(type_: Any) -> dict[str, type]:
    """Return the variants of a tagged union by name; empty if the type is not a tagged union."""
    by_name = {}
    for variant in alternatives(type_):
        names = choices(typing.get_type_hints(variant).get("name")) if is_dataclass_type(variant) else ()
        if len(names) != 1:
            return {}
        by_name[names[0]] = variant
    return by_name


def item_variants(type_: Any) -> Any:
    """Return the tagged union that the items of a list or dictionary belong to; None for any other type."""
    items = (item_type(member) for member in alternatives(type_))
    return next((item for item in items if item is not None and variants(item)), None)


def describe(field: Field) -> str:
    """Describe the values that a field accepts: `one of fp32, bf16, fp16`, `a whole number, at least 1`."""
    if named := variants(field.type):
        return one_of(tuple(named))
    if len(types_ := alternatives(field.type)) > 1:  # choices first: `auto or a number`
        ordered = sorted(types_, key=lambda type_: not choices(type_))
        return " or ".join(", ".join(choices(type_)) or describe(field.of(type_)) for type_ in ordered)
    if allowed := choices(field.type):
        return one_of(allowed)
    if is_dataclass_type(field.type):
        return (
            "{" + ", ".join(f"{name}: {describe(inner)}" for name, inner in members(field.type).items()) + "}"
        )
    if item := item_type(field.type):
        kind = "a list" if shape_of(field.type) == "list" else "a dictionary"
        return f"{kind} {_many(field.of(item))}"
    return ", ".join(filter(None, (_SCALARS[field.type], _bounds_text(field))))


def one_of(allowed: tuple[str, ...]) -> str:
    """Describe a value that is one of the allowed ones: `one of a, b`, or `a` where there is one only."""
    return f"one of {', '.join(allowed)}" if len(allowed) > 1 else allowed[0]


def _many(field: Field) -> str:
    """Describe the values that a list or dictionary holds, given a field of their type."""
    if field.type not in _MANY:
        return f"of entries, each {describe(field)}"
    return ", each ".join(filter(None, (_MANY[field.type], _bounds_text(field))))


def _bounds_text(field: Field) -> str:
    return " and ".join(
        f"{BOUNDS[name]} {bound if isinstance(bound, int) else f'{bound:g}'}"
        for name, bound in field.bounds.items()
    )
