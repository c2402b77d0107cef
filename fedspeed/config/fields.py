"""What a configuration may hold: the fields of its dataclasses, and in words which values each takes.

A field holds a scalar, one of a few words, a list (`tuple[int, ...]`), a dictionary (`dict[str, int]`), a
dataclass, or one of several of these. Dataclasses that each have a `name: Literal[...]` are the variants of a
union that the name decides (`federation.method: {name: flexlora}`).
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Literal

REQUIRED = object()  # the default of a field that has none
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
    """A field of the configuration, as its metadata describes it.

    Args:
        bounds: `min`, `max`, `above` and `below`, as far as the metadata has them; of a list or a dictionary
            they are those of each value.
        help: what the field means.
        path: the words that name no file, where all others name a file or folder that a run reads; None for
            other fields.
        default: what a configuration has that says nothing; REQUIRED where it must say something.
    """

    type: Any
    bounds: Mapping[str, float]
    help: str = ""
    path: tuple[str, ...] | None = None
    default: Any = REQUIRED

    def of(self, type_: Any) -> "Field":
        """Return a field of another type with the same bounds: an alternative of this one, or an item."""
        return Field(type_, self.bounds)

    @property
    def nested(self) -> bool:
        """Say whether a value may have values of its own: a list, a dictionary or a dataclass."""
        return any(shape_of(alternative) in ("list", "map") for alternative in alternatives(self.type))


def fields_of(cls: type, prefix: str = "") -> tuple[dict[str, Field], list[str]]:
    """(dotted key -> field, dotted names of the sections) of a tree of dataclasses. Fields of type dict are
    left out, and what lies below a nested value, see `members`.
    """
    fields = {}
    sections = []
    for name, field in members(cls).items():
        key = prefix + name
        if dataclasses.is_dataclass(field.type) and not variants(field.type):
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
    told = field.metadata
    default = REQUIRED if field.default is MISSING else field.default
    if field.default_factory is not MISSING:
        default = field.default_factory()
    bounds = {name: told[name] for name in BOUNDS if name in told}
    return Field(type_, bounds, told.get("help", ""), told.get("path"), default)


def alternatives(type_: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the one type."""
    return typing.get_args(type_) if typing.get_origin(type_) in (typing.Union, types.UnionType) else (type_,)


def choices(type_: Any) -> tuple[str, ...]:
    """Return the words that a type allows, none if it is no Literal."""
    return typing.get_args(type_) if typing.get_origin(type_) is Literal else ()


def item_type(type_: Any) -> Any:
    """Return the type of what a list or a dictionary holds, None of any other type."""
    if typing.get_origin(type_) is tuple:
        return typing.get_args(type_)[0]
    return typing.get_args(type_)[1] if typing.get_origin(type_) is dict else None


def shape_of(type_: Any) -> str:
    """Return how a value of one type is written: list, map, word, number or bool."""
    if typing.get_origin(type_) is tuple:
        return "list"
    if typing.get_origin(type_) is dict or dataclasses.is_dataclass(type_):
        return "map"
    return {bool: "bool", int: "number", float: "number"}.get(type_, "word")


def variants(type_: Any) -> dict[str, type]:
    """Return the dataclasses of a union by the name that each stands for; empty if the type is none."""
    found = {}
    for variant in alternatives(type_):
        names = (
            choices(typing.get_type_hints(variant).get("name")) if dataclasses.is_dataclass(variant) else ()
        )
        if len(names) != 1:
            return {}
        found[names[0]] = variant
    return found


def item_variants(type_: Any) -> Any:
    """Return the union of variants that a list or a dictionary holds, None of any other type."""
    items = (item_type(part) for part in alternatives(type_))
    return next((item for item in items if item is not None and variants(item)), None)


def takes(field: Field) -> str:
    """Say which values a field takes: `one of fp32, bf16, fp16`, `a whole number, at least 1`."""
    if named := variants(field.type):
        return one_of(tuple(named))
    if len(types_ := alternatives(field.type)) > 1:  # words first: `auto or a number`
        ordered = sorted(types_, key=lambda type_: not choices(type_))
        return " or ".join(", ".join(choices(type_)) or takes(field.of(type_)) for type_ in ordered)
    if words := choices(field.type):
        return one_of(words)
    if dataclasses.is_dataclass(field.type):
        return "{" + ", ".join(f"{name}: {takes(inner)}" for name, inner in members(field.type).items()) + "}"
    if item := item_type(field.type):
        kind = "a list" if shape_of(field.type) == "list" else "a dictionary"
        return f"{kind} {_many(field.of(item))}"
    return ", ".join(filter(None, (_SCALARS[field.type], _bounds_text(field))))


def one_of(words: tuple[str, ...]) -> str:
    """Say that a value is one of some words."""
    return f"one of {', '.join(words)}" if len(words) > 1 else words[0]


def _many(field: Field) -> str:
    """Say which values a list or dictionary holds."""
    if field.type not in _MANY:
        return f"of entries, each {takes(field)}"
    return ", each ".join(filter(None, (_MANY[field.type], _bounds_text(field))))


def _bounds_text(field: Field) -> str:
    return " and ".join(
        f"{BOUNDS[name]} {bound if isinstance(bound, int) else f'{bound:g}'}"
        for name, bound in field.bounds.items()
    )
