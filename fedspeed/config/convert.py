"""The fields of the configuration dataclasses, and YAML nodes to their types. Strict: nothing is rounded or guessed."""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from fedspeed.config import tree

_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class Field:
    """A field of the configuration, as its metadata describes it.

    Args:
        bounds: `min`, `max`, `above` and `below`, as far as the metadata has them.
        help: what the field means.
        path: the words that name no file, where all others name a file or folder that a run reads; None for other fields.
    """

    type: Any
    bounds: dict[str, float]
    help: str = ""
    path: tuple[str, ...] | None = None


class Unfit(Exception):
    """A value that a field does not take. The text says what it must be."""


def fields_of(cls: type, prefix: str = "") -> tuple[dict[str, Field], list[str]]:
    """(dotted key -> field, dotted names of the sections) of a tree of dataclasses. Fields of type dict are left out."""
    fields, sections = {}, []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, type_ = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(type_):
            inner, deeper = fields_of(type_, key + ".")
            fields |= inner
            sections += [key, *deeper]
        elif type_ is not dict:
            fields[key] = Field(type_, {name: field.metadata[name] for name in _BOUNDS if name in field.metadata},
                                field.metadata.get("help", ""), field.metadata.get("path"))
    return fields, sections


def convert(node: yaml.Node, field: Field) -> Any:
    """The value of `node` as the field's type. Raises Unfit."""
    if typing.get_origin(field.type) is Literal:
        return _choice(node, typing.get_args(field.type))
    if typing.get_origin(field.type) in (typing.Union, types.UnionType):
        return _word_or_number(node, field)
    value = _TYPES[field.type][1](node)
    if value is None or not all(_BOUNDS[name][1](value, bound) for name, bound in field.bounds.items()):
        raise Unfit(takes(field))
    return value


def _word_or_number(node: yaml.Node, field: Field) -> Any:
    """The value of a field that is a number or one of a few words, as `float | Literal["auto"]`; bounds are the number's."""
    number, words = typing.get_args(field.type)
    choices = typing.get_args(words)
    if (text := _text(node)) in choices:
        return text
    try:
        return convert(node, Field(number, field.bounds))
    except Unfit as unfit:
        raise Unfit(f"{', '.join(choices)} or {unfit}") from None


def takes(field: Field) -> str:
    """The values that a field takes, in words: `one of fp32, bf16, fp16`, `a whole number, at least 1`."""
    if typing.get_origin(field.type) is Literal:
        choices = typing.get_args(field.type)
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if alternatives := typing.get_args(field.type):  # such as float | Literal["auto"]
        return " or ".join(takes(Field(alternative, field.bounds)) for alternative in reversed(alternatives))
    return ", ".join(filter(None, (_TYPES[field.type][0], _bounds_text(field))))


def _bounds_text(field: Field) -> str:
    return " and ".join(f"{_BOUNDS[name][0]} {bound if isinstance(bound, int) else f'{bound:g}'}"
                        for name, bound in field.bounds.items())


def _choice(node: yaml.Node, choices: tuple[str, ...]) -> str:
    text = _text(node)
    if text in choices:
        return text
    near = difflib.get_close_matches(text or "", choices, n=1)
    raise Unfit(f"one of {', '.join(choices)}" + (f"; did you mean {near[0]}?" if near else ""))


def _text(node: yaml.Node) -> str | None:
    """Text as it was written, so that `ranks_per_client: 2` and `name: 2026-11-23` need no quotes. Not so null, true, false.

    Every text names something: a file, a folder, a field. A line break or a NUL in a name is a slip, and no file can have the latter.
    """
    fits = tree.kind(node) in ("str", "int", "float") and not _CONTROL.search(node.value)
    return node.value if fits else None


def _number(node: yaml.Node) -> float | None:
    value = float(tree.plain(node)) if tree.kind(node) in ("int", "float") else math.nan
    return value if math.isfinite(value) else None


_TYPES: dict[type, tuple[str, Callable[[yaml.Node], Any]]] = {
    bool: ("true or false", lambda node: tree.plain(node) if tree.kind(node) == "bool" else None),
    int: ("a whole number", lambda node: tree.plain(node) if tree.kind(node) == "int" else None),
    float: ("a number", _number),
    str: ('text on one line (write "" for none)', _text),
}
_BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "min": ("at least", lambda value, bound: value >= bound),
    "above": ("above", lambda value, bound: value > bound),
    "max": ("at most", lambda value, bound: value <= bound),
    "below": ("below", lambda value, bound: value < bound),
}
