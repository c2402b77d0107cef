"""YAML text to nodes that still know their line.

Scalars follow YAML 1.2, not PyYAML's 1.1: `1e-3` is a number, while `no`, `on`, `1:30` and dates are text, so nobody has to
know which words need quotes. Aliases are refused: every value has one place, and that place can be named in an error.
"""

import re
from collections.abc import Iterator
from typing import Any, ClassVar

import yaml
from yaml.composer import ComposerError

_TAG = "tag:yaml.org,2002:"
_PATTERNS = {  # in this order, the first that fits decides
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    # At most 40 digits: more is a slip of the keyboard, and Python refuses to convert some thousands of them.
    "int": re.compile(r"[-+]?[0-9]{1,40}"),
    "float": re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
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
            raise ComposerError(None, None, f"aliases such as *{event.anchor} are not supported, write the value out", event.start_mark)
        return super().compose_node(parent, index)


for _kind, _pattern in _PATTERNS.items():
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(f"(?:{_pattern.pattern})$", re.DOTALL), None)


def compose(text: str) -> yaml.Node | None:
    """The root node of one YAML document, None if there is none. Raises yaml.YAMLError."""
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def kind(node: yaml.Node) -> str:
    """`null`, `bool`, `int`, `float`, `str`, `seq` or `map`; `foreign` for a tag that is none of these or does not fit."""
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


def plain(node: yaml.Node) -> Any:
    """The node as plain Python types; a foreign scalar (see `faults`) is its text."""
    if isinstance(node, yaml.MappingNode):
        return {key: plain(value) for key, _, value in entries(node)}
    if isinstance(node, yaml.SequenceNode):
        return [plain(item) for item in node.value]
    return _CONVERT.get(kind(node), str)(node.value)


def faults(node: yaml.Node) -> Iterator[tuple[yaml.Node, str]]:
    """(node, what is wrong with it) for everything below `node` that YAML allows and a configuration does not."""
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
                yield key, f"{key.value!r} stands there twice, first in line {first_line[key.value]}; remove one"
            else:
                first_line[key.value] = key.start_mark.line + 1
            yield from faults(value)


def nested(keys: list[str], node: yaml.Node) -> yaml.Node:
    """`node` below the given keys, outermost first."""
    for key in reversed(keys):
        name = yaml.ScalarNode(_TAG + "str", key, node.start_mark, node.end_mark)
        node = yaml.MappingNode(_TAG + "map", [(name, node)], node.start_mark, node.end_mark)
    return node

