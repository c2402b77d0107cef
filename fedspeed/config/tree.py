"""YAML text to nodes that still know their line.

Scalars follow YAML 1.2, not PyYAML's 1.1: `1e-3` is a number, while `no`, `on`, `1:30` and dates are text, so
nobody has to know which words need quotes. Aliases are refused: every value has one place, and that place can
be named in an error.
"""

import re
from collections.abc import Iterator
from typing import Any, ClassVar

import yaml
from yaml.composer import ComposerError

COMMAND_LINE = "command line"
_TAG = "tag:yaml.org,2002:"
_PATTERNS = {  # in this order, the first that fits decides
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    # At most 40 digits: more is a slip of the keyboard, and Python refuses to convert some thousands of them.
    "int": re.compile(r"[-+]?[0-9]{1,40}"),
    "float": re.compile(
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
    "str": re.compile(r".*", re.DOTALL),
}
_CONVERT = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": int,
    "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict] = {}

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            told = f"aliases such as *{event.anchor} are not supported, write the value out"
            raise ComposerError(None, None, told, event.start_mark)
        return super().compose_node(parent, index)


for _kind, _pattern in _PATTERNS.items():
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(f"(?:{_pattern.pattern})$", re.DOTALL), None)


def compose(text: str, source: str = COMMAND_LINE) -> yaml.Node | None:
    """The root node of one YAML document, None if there is none. Raises yaml.YAMLError.

    Args:
        source: the file that the text is from, or `COMMAND_LINE`; every node knows it, see `place`.
    """
    loader = _Loader(text)
    loader.name = source
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def place(node: yaml.Node) -> str:
    """Where a node was written: `FILE:LINE`, or `COMMAND_LINE`."""
    mark = node.start_mark
    return COMMAND_LINE if mark.name == COMMAND_LINE else f"{mark.name}:{mark.line + 1}"


def kind(node: yaml.Node) -> str:
    """`null`, `bool`, `int`, `float`, `str`, `seq` or `map`; `foreign` for a tag that is none of these or
    does not fit.
    """
    name = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.ScalarNode):
        return name if name in _PATTERNS and _PATTERNS[name].fullmatch(node.value) else "foreign"
    return name if name == ("seq" if isinstance(node, yaml.SequenceNode) else "map") else "foreign"


def shown(node: yaml.Node) -> str:
    """The value as an error message shows it."""
    if isinstance(node, yaml.MappingNode):
        return "a section"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return repr(node.value) if kind(node) == "str" else node.value or "empty"


def entries(node: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """(key, key node, value node) of a mapping; what `faults` reports about its keys is passed over."""
    return ((key.value, key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode))


def entry(node: yaml.MappingNode, name: str) -> tuple[yaml.Node, yaml.Node] | None:
    """(key node, value node) of the first entry of that name, None if there is none."""
    return next(((key, value) for text, key, value in entries(node) if text == name), None)


def plain(node: yaml.Node) -> Any:
    """The node as plain Python types; a foreign scalar (see `faults`) is its text."""
    if isinstance(node, yaml.MappingNode):
        return {key: plain(value) for key, _, value in entries(node)}
    if isinstance(node, yaml.SequenceNode):
        return [plain(item) for item in node.value]
    return _CONVERT.get(kind(node), str)(node.value)


class _Int(int):
    """A whole number that remembers its `text`."""


class _Float(float):
    """A number that remembers its `text`."""


def written(node: yaml.Node) -> Any:
    """The same, but every number has an attribute `text`, which is how it was written: `007`, `2026`."""
    if isinstance(node, yaml.MappingNode):
        return {key: written(value) for key, _, value in entries(node)}
    if isinstance(node, yaml.SequenceNode):
        return [written(item) for item in node.value]
    value = plain(node)
    if kind(node) not in ("int", "float"):
        return value
    number = (_Int if kind(node) == "int" else _Float)(value)
    number.text = node.value
    return number


def faults(node: yaml.Node) -> Iterator[tuple[yaml.Node, str]]:
    """(node, what is wrong with it) for everything below `node` that YAML allows and a configuration does
    not.
    """
    if kind(node) == "foreign":
        yield node, f"the tag {node.tag!r} does not fit here; remove it"
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from faults(item)
    if isinstance(node, yaml.MappingNode):
        first_line: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                yield key, f"{shown(key)} stands where a key should be; a key is one word"
            elif key.value in first_line:
                first = first_line[key.value]
                yield key, f"{key.value!r} stands there twice, first in line {first}; remove one"
            else:
                first_line[key.value] = key.start_mark.line + 1
            yield from faults(value)


def laid(below: yaml.Node | None, above: yaml.Node, name: str | None = None) -> yaml.Node:
    """Lay `above` on top of `below`: mappings key by key; anything else replaces what is there, as does `{}`.

    Args:
        name: the variant of a union that is meant where `below` has no key `name`; None for other values.
            Where `above` is from another source and names another variant, the options of `below` are
            dropped.
    """
    if not (isinstance(below, yaml.MappingNode) and isinstance(above, yaml.MappingNode) and above.value):
        return above
    old, new = ({text: (key, value) for text, key, value in entries(node)} for node in (below, above))
    if name is not None and "name" in new:
        known = old["name"][1].value if "name" in old else name
        if new["name"][1].value != known:
            source = above.start_mark.name
            old = {text: pair for text, pair in old.items() if pair[0].start_mark.name == source}
    for text, (key, value) in new.items():
        old[text] = (key, laid(old[text][1], value) if text in old else value)
    return yaml.MappingNode(above.tag, list(old.values()), above.start_mark, above.end_mark)


def leaves(node: yaml.Node, key: str) -> Iterator[tuple[str, yaml.Node]]:
    """(dotted key, node) of every value below mappings; a list and an empty mapping are leaves."""
    if not (isinstance(node, yaml.MappingNode) and node.value):
        yield key, node
        return
    for name, _, value in entries(node):
        yield from leaves(value, f"{key}.{name}")


def nested(keys: list[str], node: yaml.Node) -> yaml.Node:
    """`node` below the given keys, outermost first."""
    for key in reversed(keys):
        name = yaml.ScalarNode(_TAG + "str", key, node.start_mark, node.end_mark)
        node = yaml.MappingNode(_TAG + "map", [(name, node)], node.start_mark, node.end_mark)
    return node
