"""YAML text as a tree of nodes that know the file and line they were written in.

Scalars follow YAML 1.2, not PyYAML's 1.1: `1e-3` is a number, while `no`, `on`, `1:30` and dates are text, so
that they need no quotes. Aliases are refused: each value is written in one line, which an error can name.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

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
_CONVERT: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": int,
    "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
}


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            problem = f"aliases such as *{event.anchor} are not supported, write the value out"
            raise ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {}  # instead of those for YAML 1.1


for _kind, _pattern in _PATTERNS.items():
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(f"(?:{_pattern.pattern})$", re.DOTALL), None)


def compose(text: str, source: str = COMMAND_LINE) -> yaml.Node | None:
    """Parse one YAML document and return its root node; None for an empty document.

    Args:
        source: name of the file, or `COMMAND_LINE`; `place` reports it for every node.

    Raises:
        yaml.YAMLError: the text is not YAML.
    """
    loader = _Loader(text)
    loader.name = source
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def place(node: yaml.Node) -> str:
    """Return where a node was written: `FILE:LINE`, or `COMMAND_LINE`."""
    mark = node.start_mark
    return COMMAND_LINE if mark.name == COMMAND_LINE else f"{mark.name}:{mark.line + 1}"


def kind(node: yaml.Node) -> str:
    """Return `null`, `bool`, `int`, `float`, `str`, `seq` or `map`.

    A node with another tag, or with a tag that does not fit its content, is `foreign`.
    """
    name = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.ScalarNode):
        return name if name in _PATTERNS and _PATTERNS[name].fullmatch(node.value) else "foreign"
    expected = "seq" if isinstance(node, yaml.SequenceNode) else "map"
    return name if name == expected else "foreign"


def shown(node: yaml.Node) -> str:
    """Return the value as an error message shows it."""
    if isinstance(node, yaml.MappingNode):
        return "a section"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return repr(node.value) if kind(node) == "str" else node.value or "empty"


def entries(node: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """Return (key, key node, value node) of a mapping; keys that `faults` reports are left out."""
    return ((key.value, key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode))


def entry(node: yaml.MappingNode, name: str) -> tuple[yaml.Node, yaml.Node] | None:
    """Return (key node, value node) of the first entry with that name; None if there is none."""
    return next(((key, value) for text, key, value in entries(node) if text == name), None)


def plain(node: yaml.Node) -> Any:
    """Convert the node to plain Python types; a foreign scalar (see `faults`) becomes its text."""
    if isinstance(node, yaml.MappingNode):
        return {key: plain(value) for key, _, value in entries(node)}
    if isinstance(node, yaml.SequenceNode):
        return [plain(item) for item in node.value]
    return _CONVERT.get(kind(node), str)(node.value)


class _Int(int):
    """A whole number with the text that it was written as."""

    text: str


class _Float(float):
    """A number with the text that it was written as."""

    text: str


def with_source_text(node: yaml.Node) -> Any:
    """Convert the node as `plain` does; every number has an attribute `text`, such as `007` or `2026`."""
    if isinstance(node, yaml.MappingNode):
        return {key: with_source_text(value) for key, _, value in entries(node)}
    if isinstance(node, yaml.SequenceNode):
        return [with_source_text(item) for item in node.value]
    value = plain(node)
    if kind(node) not in ("int", "float"):
        return value
    number: _Int | _Float = _Int(value) if kind(node) == "int" else _Float(value)
    number.text = node.value
    return number


def faults(node: yaml.Node) -> Iterator[tuple[yaml.Node, str]]:
    """Yield (node, message) for everything below `node` that YAML allows and a configuration does not."""
    if kind(node) == "foreign":
        yield node, f"the tag {node.tag!r} does not fit here; remove it"
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from faults(item)
    if isinstance(node, yaml.MappingNode):
        first_line: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                yield key, f"{shown(key)} stands where a key should be; write the key as text"
            elif key.value in first_line:
                first = first_line[key.value]
                yield key, f"{key.value!r} is given twice, first in line {first}; remove one"
            else:
                first_line[key.value] = key.start_mark.line + 1
            yield from faults(value)


def overlay(below: yaml.Node | None, above: yaml.Node, name: str | None = None) -> yaml.Node:
    """Merge two nodes: mappings key by key; any other value of `above`, and `{}`, replaces that of `below`.

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
        old[text] = (key, overlay(old[text][1], value) if text in old else value)
    return yaml.MappingNode(above.tag, list(old.values()), above.start_mark, above.end_mark)


def leaves(node: yaml.Node, key: str) -> Iterator[tuple[str, yaml.Node]]:
    """Yield (dotted key, node) of every leaf; a list and an empty mapping are leaves."""
    if not (isinstance(node, yaml.MappingNode) and node.value):
        yield key, node
        return
    for name, _, value in entries(node):
        yield from leaves(value, f"{key}.{name}")


def nested(keys: list[str], node: yaml.Node) -> yaml.Node:
    """Return mappings that hold `node` below the given keys, outermost first."""
    for key in reversed(keys):
        name = yaml.ScalarNode(_TAG + "str", key, node.start_mark, node.end_mark)
        node = yaml.MappingNode(_TAG + "map", [(name, node)], node.start_mark, node.end_mark)
    return node
