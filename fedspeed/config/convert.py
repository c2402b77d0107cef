"""Conversion of YAML nodes to the values of configuration fields. Strict: nothing is rounded or guessed.

pydantic converts the value and locates what does not fit. This module finds the YAML node at that location
and writes the message: the key, its value, the accepted values and the remedy.
"""

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, reduce
from operator import or_
from typing import Annotated, Any, NotRequired, Required

import pydantic
import yaml
from typing_extensions import TypedDict

from fedspeed.config import tree
from fedspeed.config.fields import (
    REQUIRED,
    Field,
    alternatives,
    choices,
    describe,
    is_dataclass_type,
    item_type,
    item_variants,
    members,
    shape_of,
    variants,
)
from fedspeed.config.names import remedy_for_unknown

# Text names a file, a folder or a field: a line break in it is a mistake, and no file name holds a NUL.
_ONE_LINE = r"^[^\x00-\x1f\x7f]*$"
_PYDANTIC_BOUNDS = {"min": "ge", "above": "gt", "max": "le", "below": "lt"}


class InvalidValue(Exception):
    """A value that a field does not accept.

    Attributes:
        faults: (YAML node, message) for everything that is wrong with it; empty where `tree.faults` reports
            the fault already.
    """

    def __init__(self, faults: list[tuple[yaml.Node, str]]):
        super().__init__("; ".join(text for _, text in faults))
        self.faults = faults


def convert(node: yaml.Node, field: Field, key: str) -> Any:
    """Convert a YAML node to the type of a field.

    Args:
        key: dotted key of the field, for messages.

    Raises:
        InvalidValue: the field does not accept the value.
    """
    try:
        return _adapter(field).validate_python(tree.with_source_text(node))
    except pydantic.ValidationError as error:
        root = _Location(field, node, key)
        locations = [_locate(root, found["loc"]) for found in error.errors(include_url=False)]
        faults = [_fault(location) for location in locations]
        raise InvalidValue([fault for fault in faults if fault is not None]) from None


def expand_shorthand(node: yaml.Node, type_: Any) -> yaml.Node:
    """Write out every variant that is given by its name alone: `flexlora` becomes `{name: flexlora}`."""
    if variants(type_):
        is_name = isinstance(node, yaml.ScalarNode) and tree.kind(node) != "null"
        return tree.nested(["name"], node) if is_name else node
    inner = item_variants(type_)
    if inner is None or not isinstance(node, yaml.SequenceNode):
        return node
    items = [expand_shorthand(item, inner) for item in node.value]
    return yaml.SequenceNode(node.tag, items, node.start_mark, node.end_mark)


@cache
def _adapter(field: Field) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(_annotated(field))


def _annotated(field: Field) -> Any:
    """Return the field's type with pydantic annotations: strict, with its bounds, unions with their tags."""
    if (by_name := variants(field.type)) and len(by_name) > 1:
        return _union({name: field.of(variant) for name, variant in by_name.items()}, _name)
    if len(types_ := alternatives(field.type)) > 1 and not by_name:
        by_shape = {shape_of(type_): field.of(type_) for type_ in types_}
        return _union(by_shape, _shape_of_text if str in types_ else _shape)
    if choices(field.type):
        return Annotated[field.type, pydantic.BeforeValidator(_text)]
    if is_dataclass_type(field.type):
        return _dictionary(field.type)
    if item := item_type(field.type):
        inner: Any = _annotated(field.of(item))
        return tuple[inner, ...] if shape_of(field.type) == "list" else dict[str, inner]
    if field.type is str:
        return Annotated[str, pydantic.Field(strict=True, pattern=_ONE_LINE), pydantic.BeforeValidator(_text)]
    constraints: dict[str, Any] = {_PYDANTIC_BOUNDS[name]: bound for name, bound in field.bounds.items()}
    if field.type is float:
        constraints["allow_inf_nan"] = False
    return Annotated[field.type, pydantic.Field(strict=True, **constraints)]


def _union(by_tag: dict[str, Field], tag_of: Callable[[Any], str | None]) -> Any:
    tagged = [Annotated[_annotated(member), pydantic.Tag(tag)] for tag, member in by_tag.items()]
    return Annotated[reduce(or_, tagged), pydantic.Discriminator(tag_of)]


def _dictionary(cls: type) -> Any:
    """Return the type of a dictionary with the fields of a dataclass, which validation turns into one.

    Other keys are refused.
    """
    keys = {
        name: (Required if inner.default is REQUIRED else NotRequired)[_annotated(inner)]
        for name, inner in members(cls).items()
    }
    make_type: Any = TypedDict  # type checkers expect literal names, and these are known at run time
    dictionary = make_type(cls.__name__, keys)
    dictionary.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")
    return Annotated[dictionary, pydantic.AfterValidator(lambda values: cls(**values))]


def _text(value: Any) -> Any:
    """Return a number as it was written, so that `name: 2026-11-23` and `name: 007` need no quotes.

    Null, true and false are returned unchanged, and are refused.
    """
    return getattr(value, "text", value)


def _name(value: Any) -> Any:
    return _text(value.get("name")) if isinstance(value, dict) else None


def _shape(value: Any) -> str | None:
    return next((shape for type_, shape in _SHAPES.items() if isinstance(value, type_)), None)


def _shape_of_text(value: Any) -> str | None:
    """Return the shape of a value where text is accepted, so that a number counts as text."""
    shape = _shape(value)
    return "word" if shape == "number" else shape


# In this order, because a bool is also an int.
_SHAPES = {bool: "bool", list: "list", dict: "map", str: "word", int: "number", float: "number"}


@dataclass(frozen=True)
class _Location:
    """A location inside a value: the field and the node there, and its dotted key.

    Attributes:
        unknown_in: the dataclass that has no field of this name; None where the key is known.
        missing: whether the key is required and was not given.
    """

    field: Field
    node: yaml.Node
    key: str
    unknown_in: type | None = None
    missing: bool = False


def _locate(location: _Location, loc: tuple[str | int, ...]) -> _Location:
    """Follow pydantic's `loc` from a location: keys, indices, and a tag for every union on the path."""
    if not loc:
        return location
    field = location.field
    first, *rest = loc
    if (by_name := variants(field.type)) and len(by_name) > 1:
        member: Any = by_name[str(first)]
        return _locate(dataclasses.replace(location, field=field.of(member)), tuple(rest))
    if len(types_ := alternatives(field.type)) > 1 and not by_name:
        if not rest and first not in ("list", "map"):
            return location  # the message names what the whole union accepts
        member = next(type_ for type_ in types_ if shape_of(type_) == first)
        return _locate(dataclasses.replace(location, field=field.of(member)), tuple(rest))
    return _locate(_entry(location, first), tuple(rest))


def _entry(location: _Location, name: str | int) -> _Location:
    """Return the location of one entry of a list, a dictionary or a dataclass."""
    if isinstance(name, int):
        item = location.field.of(item_type(location.field.type))
        return _Location(item, location.node.value[name], f"{location.key}[{name}]")
    key = f"{location.key}.{name}"
    assert isinstance(location.node, yaml.MappingNode)  # pydantic has read a key of it
    found = tree.entry(location.node, name)
    type_ = location.field.type
    if is_dataclass_type(type_) and name in members(type_):
        node = location.node if found is None else found[1]
        return _Location(members(type_)[name], node, key, missing=found is None)
    assert found is not None  # only a field of a dataclass can be missing
    if is_dataclass_type(type_):
        return _Location(location.field, found[0], key, unknown_in=type_)
    return _Location(location.field.of(item_type(type_)), found[1], key)


def _fault(location: _Location) -> tuple[yaml.Node, str] | None:
    """Return (node, message) for an invalid location; None where `tree.faults` reports it."""
    node = location.node
    key = location.key
    field = location.field
    if location.unknown_in is not None:
        return node, _unknown(location, location.unknown_in)
    if location.missing:
        return node, f"{key} is missing; it must be {describe(field)}"
    if tree.kind(node) == "foreign":
        return None
    allowed = [choice for type_ in alternatives(field.type) for choice in choices(type_)]
    if by_name := variants(field.type):
        allowed = list(by_name)
        if isinstance(node, yaml.MappingNode):
            key = f"{key}.name"
            entry = tree.entry(node, "name")
            if entry is None:
                return node, f"{key} is missing; it must be {describe(field)}"
            node = entry[1]
    near = difflib.get_close_matches(node.value, allowed, n=1) if isinstance(node, yaml.ScalarNode) else []
    hint = f"; did you mean {near[0]}?" if near else _brackets(location)
    return node, f"{key} is {tree.shown(node)}, but must be {describe(field)}{hint}"


def _brackets(location: _Location) -> str:
    """Return the remedy for a single variant where a list of variants belongs; empty for anything else."""
    if not item_variants(location.field.type) or tree.kind(location.node) == "null":
        return ""
    entry = location.node.value if isinstance(location.node, yaml.ScalarNode) else "{...}"
    return f"; put it into brackets: [{entry}]"


def _unknown(location: _Location, cls: type) -> str:
    """Return the message for a key that the dataclass does not have, with the likeliest key."""
    parent = location.key.rpartition(".")[0]
    fields = members(cls)
    name = fields["name"].default if variants(cls) else ""
    where = f" where {parent}.name is {name}" if name else ""
    remedy = remedy_for_unknown(location.key, [f"{parent}.{field}" for field in fields])
    return f"there is no key {location.key}{where}; {remedy}"
