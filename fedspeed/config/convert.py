"""YAML nodes to the values of a field. Strict: nothing is rounded or guessed.

pydantic converts and says where in a nested value something does not fit; which node that is, and what must
stand there, is told in our own words.
"""

import dataclasses
import difflib
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
    item_type,
    item_variants,
    members,
    shape_of,
    takes,
    variants,
)
from fedspeed.config.names import remedy_for_unknown

# Every text names something: a file, a folder, a field. A line break or a NUL in a name is a slip, and no
# file can have the latter.
_ONE_LINE = r"^[^\x00-\x1f\x7f]*$"
_PYDANTIC = {"min": "ge", "above": "gt", "max": "le", "below": "lt"}


class InvalidValue(Exception):
    """A value that a field does not take.

    Attributes:
        faults: (node, what is wrong with it) for everything that is; none for what `tree.faults` tells of.
    """

    def __init__(self, faults: list[tuple[yaml.Node, str]]):
        super().__init__("; ".join(text for _, text in faults))
        self.faults = faults


def convert(node: yaml.Node, field: Field, key: str) -> Any:
    """Return the value of `node` as the type of the field that has this dotted key. Raises InvalidValue."""
    try:
        return _adapter(field).validate_python(tree.written(node))
    except pydantic.ValidationError as error:
        spots = [_spot(_Spot(field, node, key), found["loc"]) for found in error.errors(include_url=False)]
        raise InvalidValue([fault for spot in spots if (fault := _fault(spot))]) from None


def expand_shorthand(node: yaml.Node, type_: Any) -> yaml.Node:
    """Return the node with every variant that is named only by its name (`method: flexlora`) written out."""
    if variants(type_):
        named = isinstance(node, yaml.ScalarNode) and tree.kind(node) != "null"
        return tree.nested(["name"], node) if named else node
    inner = item_variants(type_)
    if inner is None or not isinstance(node, yaml.SequenceNode):
        return node
    items = [expand_shorthand(item, inner) for item in node.value]
    return yaml.SequenceNode(node.tag, items, node.start_mark, node.end_mark)


@cache
def _adapter(field: Field) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(_annotated(field))


def _annotated(field: Field) -> Any:
    """Return the field's type as pydantic takes it: strict, with its bounds, every union with its tags."""
    if (named := variants(field.type)) and len(named) > 1:
        return _union({name: field.of(variant) for name, variant in named.items()}, _name)
    if len(types_ := alternatives(field.type)) > 1 and not named:
        return _union({shape_of(type_): field.of(type_) for type_ in types_}, _shape)
    if choices(field.type):
        return Annotated[field.type, pydantic.BeforeValidator(_text)]
    if dataclasses.is_dataclass(field.type):
        return _dictionary(field.type)
    if item := item_type(field.type):
        inner = _annotated(field.of(item))
        return tuple[inner, ...] if shape_of(field.type) == "list" else dict[str, inner]
    if field.type is str:
        return Annotated[str, pydantic.Field(strict=True, pattern=_ONE_LINE), pydantic.BeforeValidator(_text)]
    bounds = {_PYDANTIC[name]: bound for name, bound in field.bounds.items()}
    finite = {"allow_inf_nan": False} if field.type is float else {}
    return Annotated[field.type, pydantic.Field(strict=True, **finite, **bounds)]


def _union(parts: dict[str, Field], tag_of: Any) -> Any:
    tagged = [Annotated[_annotated(part), pydantic.Tag(tag)] for tag, part in parts.items()]
    return Annotated[reduce(or_, tagged), pydantic.Discriminator(tag_of)]


def _dictionary(cls: type) -> Any:
    """Return a dictionary with the fields of a dataclass, which becomes one. Other keys are refused."""
    keys = {
        name: (Required if inner.default is REQUIRED else NotRequired)[_annotated(inner)]
        for name, inner in members(cls).items()
    }
    dictionary = TypedDict(cls.__name__, keys)
    dictionary.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")
    return Annotated[dictionary, pydantic.AfterValidator(lambda values: cls(**values))]


def _text(value: Any) -> Any:
    """Return a number as it was written, so that `name: 2026-11-23` and `name: 007` need no quotes. Null,
    true and false stay what they are, and are refused.
    """
    return getattr(value, "text", value)


def _name(value: Any) -> Any:
    return _text(value.get("name")) if isinstance(value, dict) else None


def _shape(value: Any) -> str | None:
    return next((shape for type_, shape in _SHAPES.items() if isinstance(value, type_)), None)


# In this order, since a bool is an int too.
_SHAPES = {bool: "bool", list: "list", dict: "map", str: "word", int: "number", float: "number"}


@dataclass(frozen=True)
class _Spot:
    """A place in a value: what it may hold, the node that is there, and its key.

    Attributes:
        inside: the dataclass that the key would belong to, if there is none of that name; else None.
        missing: whether the key is not there, and must be.
    """

    field: Field
    node: yaml.Node
    key: str
    inside: type | None = None
    missing: bool = False


def _spot(spot: _Spot, loc: tuple[str | int, ...]) -> _Spot:
    """Return the place that pydantic means by `loc`: keys, indices, and a tag for every union on the way."""
    if not loc:
        return spot
    field = spot.field
    (first, *rest) = loc
    if (named := variants(field.type)) and len(named) > 1:
        return _spot(dataclasses.replace(spot, field=field.of(named[first])), tuple(rest))
    if len(types_ := alternatives(field.type)) > 1 and not named:
        if not rest and first not in ("list", "map"):
            return spot  # the whole union says what it takes
        part = next(type_ for type_ in types_ if shape_of(type_) == first)
        return _spot(dataclasses.replace(spot, field=field.of(part)), tuple(rest))
    return _spot(_below(spot, first), tuple(rest))


def _below(spot: _Spot, name: str | int) -> _Spot:
    """Return the place of one entry."""
    if isinstance(name, int):
        return _Spot(spot.field.of(item_type(spot.field.type)), spot.node.value[name], f"{spot.key}[{name}]")
    key = f"{spot.key}.{name}"
    found = tree.entry(spot.node, name)
    if not dataclasses.is_dataclass(spot.field.type):
        return _Spot(spot.field.of(item_type(spot.field.type)), found[1], key)
    fields = members(spot.field.type)
    if name not in fields:
        return _Spot(spot.field, found[0], key, inside=spot.field.type)
    return _Spot(fields[name], spot.node if found is None else found[1], key, missing=found is None)


def _fault(spot: _Spot) -> tuple[yaml.Node, str] | None:
    """Return what is wrong at a place, None where it has been told already."""
    node = spot.node
    key = spot.key
    field = spot.field
    if spot.inside is not None:
        return node, _unknown(spot)
    if spot.missing:
        return node, f"{key} is missing; it must be {takes(field)}"
    if tree.kind(node) == "foreign":  # that is among the faults already
        return None
    words = [word for type_ in alternatives(field.type) for word in choices(type_)]
    if named := variants(field.type):
        words = list(named)
        if isinstance(node, yaml.MappingNode):
            key = f"{key}.name"
            said = tree.entry(node, "name")
            if said is None:
                return node, f"{key} is missing; it must be {takes(field)}"
            node = said[1]
    near = difflib.get_close_matches(node.value, words, n=1) if isinstance(node, yaml.ScalarNode) else []
    hint = f"; did you mean {near[0]}?" if near else _brackets(spot)
    return node, f"{key} is {tree.shown(node)}, but must be {takes(field)}{hint}"


def _brackets(spot: _Spot) -> str:
    """Return the remedy for one variant where a list of variants belongs, empty for anything else."""
    if not item_variants(spot.field.type) or tree.kind(spot.node) == "null":
        return ""
    entry = spot.node.value if isinstance(spot.node, yaml.ScalarNode) else "{...}"
    return f"; put it into brackets: [{entry}]"


def _unknown(spot: _Spot) -> str:
    """Say that there is no such key, and which was meant."""
    parent = spot.key.rpartition(".")[0]
    fields = members(spot.inside)
    named = fields["name"].default if variants(spot.inside) else ""
    where = f" where {parent}.name is {named}" if named else ""
    remedy = remedy_for_unknown(spot.key, [f"{parent}.{name}" for name in fields])
    return f"there is no key {spot.key}{where}; {remedy}"
