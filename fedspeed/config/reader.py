"""Reading of the documents that make up a configuration: a YAML file and `key=value` overrides."""

import dataclasses
import difflib
import typing
from pathlib import Path
from typing import Any

import yaml

from fedspeed.config import tree
from fedspeed.config.convert import InvalidValue, convert, expand_shorthand
from fedspeed.config.fields import Field, fields_of, variants
from fedspeed.config.names import current_spelling, remedy_for_unknown
from fedspeed.config.run import RunConfig
from fedspeed.config.tree import COMMAND_LINE, place

DEEPSPEED = "deepspeed"  # the one section whose keys are DeepSpeed's
MAX_DOTS = 32  # in a key; DeepSpeed's longest has four
SHORTHAND = {"evaluation": "tasks"}  # sections that a list may stand for, with the key that gets it
FIELDS, SECTIONS = fields_of(RunConfig)


class Reader:
    """Collects values, sources and problems over several documents; later documents override earlier ones.

    A scalar is converted as soon as it is read, so that a value that is overridden is checked too. Nested
    values are merged over all documents before conversion, because `federation.method.name=...` and
    `federation.method.rule=...` give one value in two overrides.

    Attributes:
        problems: messages, each with the place.
        refused: keys with an invalid value.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.refused: set[str] = set()
        self._values: dict[str, Any] = {}
        self._nodes: dict[str, yaml.Node] = {}  # by key, of every key that was given
        self._deepspeed: yaml.Node | None = None  # that section

    def read_file(self, path: Path, name: str = "", *, without: str = "") -> bool:
        """Read a YAML file; return False if it holds no configuration.

        Args:
            name: of the file in sources and problems; empty: its path. without: a section that is left out.
        """
        try:
            root = tree.compose(path.read_text(encoding="utf-8"), name or str(path))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            self.problems.append(_why_unreadable(path, error))
            return False
        if not isinstance(root, yaml.MappingNode):
            found = "is empty" if root is None or tree.kind(root) == "null" else f"holds {tree.shown(root)}"
            self.problems.append(
                f"{path}: {found}; a run's YAML holds sections such as model: and train:, "
                "see ds_configs/quickstart.yaml"
            )
            return False
        if without:
            pairs = [(key, value) for name, key, value in tree.entries(root) if name != without]
            root = yaml.MappingNode(root.tag, pairs, root.start_mark, root.end_mark)
        self._document(root)
        return True

    def read_override(self, override: str) -> None:
        """Read one `key=value` of the command line."""
        key, equals, text = (part.strip() for part in override.partition("="))
        if not equals or not all(key.split(".")) or key.count(".") > MAX_DOTS:
            self.problems.append(
                f"{COMMAND_LINE}: {override!r} is not an override; write key=value, for example train.lr=1e-3"
            )
            return
        try:  # `run.name=` is how a shell writes an empty text; YAML would read null
            node = tree.compose(text or "''")
        except (yaml.YAMLError, RecursionError) as error:
            shown = override if len(override) <= 80 else f"{override[:77]}..."
            self.problems.append(
                f"{COMMAND_LINE}: the value of {shown!r} is not YAML ({_reason(error)}); "
                "put it in double quotes"
            )
            return
        if node is None:
            self.problems.append(
                f"{COMMAND_LINE}: the value of {override!r} is only a YAML comment; put it in double quotes"
            )
            return
        self._document(tree.nested(key.split("."), node))

    def config(self) -> RunConfig:
        """Build the configuration from all valid values, with defaults in place of the refused ones.

        Call it once, after all documents are read.
        """
        for key, node in self._nodes.items():
            if FIELDS[key].nested:
                self._convert(key, node)

        def build(cls: type, prefix: str) -> Any:
            arguments = {}
            for name, type_ in typing.get_type_hints(cls).items():
                key = prefix + name
                if key in self._values:
                    arguments[name] = self._values[key]
                elif key in SECTIONS:
                    arguments[name] = build(type_, key + ".")
            return cls(**arguments)

        deepspeed = {} if self._deepspeed is None else tree.plain(self._deepspeed)
        return dataclasses.replace(build(RunConfig, ""), deepspeed=deepspeed)

    def named(self, key: str) -> str:
        """Return the name of the variant that the documents choose for a nested key; empty if they choose
        none.
        """
        node = self._nodes.get(key)
        chosen = tree.entry(node, "name") if isinstance(node, yaml.MappingNode) else None
        return chosen[1].value if chosen and isinstance(chosen[1], yaml.ScalarNode) else ""

    def given(self) -> dict[str, str]:
        """Return dotted key -> source of everything that is not a default."""
        sources: dict[str, str] = {}
        for key, node in self._nodes.items():
            if key in self._values:
                inner = {leaf: place(value) for leaf, value in tree.leaves(node, key)}
                sources[key] = " and ".join(dict.fromkeys(inner.values()))
                sources |= inner if key not in inner else {}
        if self._deepspeed is not None:
            sources |= {key: place(node) for key, node in tree.leaves(self._deepspeed, DEEPSPEED)}
        return sources

    def _document(self, root: yaml.Node) -> None:
        assert isinstance(root, yaml.MappingNode)
        self.problems += [f"{place(node)}: {fault}" for node, fault in tree.faults(root)]
        self._section(root, "")

    def _section(self, node: yaml.MappingNode, prefix: str) -> None:
        for name, key_node, value in tree.entries(node):
            key = prefix + name
            if key in FIELDS:
                self._field(key, value)
            elif key not in (DEEPSPEED, *SECTIONS):
                text = value.value if isinstance(value, yaml.ScalarNode) else ""
                remedy = remedy_for_unknown(key, [*FIELDS, *SECTIONS, DEEPSPEED], text)
                self.problems.append(f"{place(key_node)}: there is no key {key}; {remedy}")
            elif isinstance(value, yaml.MappingNode):
                if key == DEEPSPEED:
                    self._deepspeed = tree.overlay(self._deepspeed, value) if value.value else self._deepspeed
                else:
                    self._section(value, key + ".")
            elif key in SHORTHAND and isinstance(value, yaml.SequenceNode):
                self._field(f"{key}.{SHORTHAND[key]}", value)
            elif tree.kind(value) != "null":  # a section whose keys are all commented out is empty
                self.problems.append(
                    f"{place(value)}: {key} is {tree.shown(value)}, but it is a section; "
                    f"write {key}.KEY=VALUE, in YAML the key below {key}:"
                )

    def _field(self, key: str, node: yaml.Node) -> None:
        field = FIELDS[key]
        if field.nested:
            above = expand_shorthand(node, field.type)
            self._nodes[key] = tree.overlay(self._nodes.get(key), above, _default_name(field))
        elif self._convert(key, node):
            self._nodes[key] = node

    def _convert(self, key: str, node: yaml.Node) -> bool:
        """Convert the value of a key; return whether the field accepts it."""
        field = FIELDS[key]
        try:
            self._values[key] = convert(_named(node, field), field, key)
            return True
        except InvalidValue as error:
            self.refused.add(key)
            for at, text in error.faults:
                new = current_spelling(key, at.value) if at is node and "did you mean" not in text else ""
                remedy = f"; write '{key}={new}', in YAML {key.rpartition('.')[2]}: {new}" if new else ""
                self.problems.append(f"{place(at)}: {text}{remedy}")
            return False


def _default_name(field: Field) -> str | None:
    """Return the name of a field's default variant; None for a field without variants."""
    return getattr(field.default, "name", None) if variants(field.type) else None


def _named(node: yaml.Node, field: Field) -> yaml.Node:
    """Add the name of the default variant to a node that gives options and no name."""
    name = _default_name(field)
    if name is None or not isinstance(node, yaml.MappingNode) or tree.entry(node, "name"):
        return node
    default = tree.compose(name)
    assert default is not None  # a name is not empty
    pair = tree.nested(["name"], default).value
    return yaml.MappingNode(node.tag, [*pair, *node.value], node.start_mark, node.end_mark)


def _why_unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        beside = sorted(p.name for p in path.parent.glob("*.y*ml"))
        likely = difflib.get_close_matches(path.name, beside, n=1) or beside
        remedy = f"{path.parent} holds {', '.join(likely)}" if likely else "check the path"
        return f"{path}: there is no such file; {remedy}"
    if isinstance(error, OSError):
        return f"{path}: cannot be read ({error.strerror}); give a readable YAML file"
    if isinstance(error, UnicodeDecodeError):
        return f"{path}: is not UTF-8 text (byte {error.start}); give a YAML file"
    if isinstance(error, RecursionError):
        return (
            f"{path}: is nested too deeply to be a configuration; give a run's YAML, such as "
            "ds_configs/quickstart.yaml"
        )
    mark = getattr(error, "problem_mark", None)
    line = f":{mark.line + 1}" if mark else ""
    return f"{path}{line}: is not YAML ({_reason(error)}); mend this line or the one above it"


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return getattr(error, "problem", None) or str(error).splitlines()[0]
