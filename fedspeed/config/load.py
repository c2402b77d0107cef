"""A run's YAML and `key=value` overrides to a typed `RunConfig`, with the place every value came from.

All problems are collected and raised as one `ConfigError`, so that a file is mended once and not once per mistake.
"""

import dataclasses
import difflib
import operator
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedspeed.config import paths, tree
from fedspeed.config.check import conflicts
from fedspeed.config.convert import Unfit, convert, fields_of
from fedspeed.config.names import remedy_for_unknown
from fedspeed.config.run import RunConfig
from fedspeed.errors import ConfigError

DEFAULT = "default"
COMMAND_LINE = "command line"
FREE = "deepspeed"  # the one section whose keys are not ours
DEEPEST = 32  # dots in a key; DeepSpeed's deepest has four
FIELDS, SECTIONS = fields_of(RunConfig)

Place = Callable[[yaml.Node], str]


@dataclass(frozen=True)
class Loaded:
    """A checked configuration.

    Args:
        config: the values.
        sources: dotted key -> `default`, `FILE:LINE` or `command line`. The deepspeed section has an entry for each of its
            leaves, and the one entry `deepspeed` if it is empty.
        path: the YAML, None if there was none.
        written: dotted key -> text, of inputs whose path was written in another way than `config` has it (see `paths.found`).
    """

    config: RunConfig
    sources: dict[str, str]
    path: Path | None
    written: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def as_written(self) -> RunConfig:
        """The configuration as it was written, which is the same from wherever the command is given."""
        return with_values(self.config, self.written)

    @property
    def places(self) -> dict[str, str]:
        """Dotted key -> absolute path of every input that is a file or folder here."""
        return {key: place for key, text in _inputs(self.config) if (place := paths.place(text))}

    @property
    def folder(self) -> Path:
        """Where a relative `deepspeed.base` starts: beside the YAML, or at the command that gave it."""
        by_command = self.path is None or self.sources.get(f"{FREE}.base") == COMMAND_LINE
        return Path.cwd() if by_command else self.path.parent

    def searched(self, key: str) -> str:
        """Say in brackets where the input `key` was looked for, which is nowhere; empty for an absolute path."""
        text = operator.attrgetter(key)(self.as_written)
        if Path(text).is_absolute() or text.startswith("~"):
            return ""
        given_here = self.path is None or self.sources.get(key) == COMMAND_LINE
        folders = [Path.cwd()] if given_here else [self.path.parent.resolve(), Path.cwd()]
        return f" (looked for in {' and '.join(map(str, dict.fromkeys(folders)))})"

    @property
    def run_folder(self) -> Path:
        """`runs/<name>`; the name is the YAML's unless the run has its own."""
        return Path(self.config.run.out) / (self.config.run.name or (self.path.stem if self.path else "run"))


def load(path: Path | None, overrides: Sequence[str] = ()) -> Loaded:
    """Reads a run's YAML and lays the overrides on top.

    Args:
        path: the YAML file, None for the defaults alone.
        overrides: `key=value` with a dotted key; the value is read as YAML. The last one of a key counts.

    Raises:
        ConfigError: with every problem of the file, of the overrides and between the sections.
    """
    reader = _Reader()
    readable = path is None or reader.read_file(path)
    for override in overrides:
        reader.read_override(override)
    config, given = reader.config(), reader.given()
    problems = reader.problems
    if readable:
        problems += _cross_section_problems(config, given, reader.refused, path)
    if problems:
        raise ConfigError(problems)
    sources = dict.fromkeys(FIELDS, DEFAULT) | given
    moved = _moved(config, sources, path)
    return Loaded(with_values(config, moved), sources if config.deepspeed else sources | {FREE: DEFAULT}, path,
                  {key: text for key, text in _inputs(config) if key in moved})


def _inputs(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of the keys that name files and folders to be read, but for those that hold a word instead."""
    for key, field in FIELDS.items():
        text = operator.attrgetter(key)(config)
        if field.path is not None and text not in field.path:
            yield key, text


def _moved(config: RunConfig, sources: dict[str, str], path: Path | None) -> dict[str, str]:
    """Dotted key -> where an input is, of those that are elsewhere than their text says to this process."""
    found = {}
    for key, text in _inputs(config):
        place = paths.found(text, None if sources[key] == COMMAND_LINE or path is None else path.parent)
        if place != text:
            found[key] = place
    return found


def with_values(config: RunConfig, values: dict[str, str]) -> RunConfig:
    """The configuration with some values replaced, given by dotted keys of two words."""
    for key, value in values.items():
        section, _, name = key.partition(".")
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{name: value})})
    return config


def _cross_section_problems(config: RunConfig, given: dict[str, str], refused: set[str], path: Path | None) -> list[str]:
    """What `check` finds, with places. A rule about a key whose value was refused has nothing to add and is left out."""
    def places(keys: Sequence[str]) -> str:
        found = [next((source for key, source in given.items() if f"{key}.".startswith(f"{wanted}.")), None) for wanted in keys]
        return " and ".join(dict.fromkeys(filter(None, found))) or str(path or COMMAND_LINE)

    return [f"{places(conflict.keys)}: {conflict.text}" for conflict in conflicts(config) if refused.isdisjoint(conflict.keys)]


@dataclass(frozen=True)
class _Sourced:
    value: Any
    source: str


class _Reader:
    """Collects values, sources and problems over several documents; a later value replaces an earlier one."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.refused: set[str] = set()  # keys whose value was no good
        self._values: dict[str, _Sourced] = {}
        self._free: dict[str, Any] = {}  # the deepspeed section: nested dicts with _Sourced leaves

    def read_file(self, path: Path) -> bool:
        """False if nothing could be read."""
        try:
            root = tree.compose(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            self.problems.append(_why_unreadable(path, error))
            return False
        if not isinstance(root, yaml.MappingNode):
            found = "is empty" if root is None or tree.kind(root) == "null" else f"holds {tree.shown(root)}"
            self.problems.append(f"{path}: {found}; a run's YAML holds sections such as model: and train:, see ds_configs/quickstart.yaml")
            return False
        self._document(root, lambda node: f"{path}:{node.start_mark.line + 1}")
        return True

    def read_override(self, override: str) -> None:
        key, equals, text = (part.strip() for part in override.partition("="))
        if not equals or not all(key.split(".")) or key.count(".") > DEEPEST:
            self.problems.append(f"{COMMAND_LINE}: {override!r} is not an override; write key=value, for example train.lr=1e-3")
            return
        try:
            node = tree.compose(text or "''")  # `run.name=` is how a shell writes an empty text; YAML would read null
        except (yaml.YAMLError, RecursionError) as error:
            shown = override if len(override) <= 80 else f"{override[:77]}..."
            self.problems.append(f"{COMMAND_LINE}: the value of {shown!r} is not YAML ({_reason(error)}); put it in double quotes")
            return
        if node is None:
            self.problems.append(f"{COMMAND_LINE}: the value of {override!r} is only a YAML comment; put it in double quotes")
            return
        self._document(tree.nested(key.split("."), node), lambda node: COMMAND_LINE)

    def config(self) -> RunConfig:
        """The configuration of all good values; defaults stand in for the refused ones."""
        def build(cls: type, prefix: str) -> Any:
            arguments = {}
            for name, type_ in typing.get_type_hints(cls).items():
                key = prefix + name
                if dataclasses.is_dataclass(type_):
                    arguments[name] = build(type_, key + ".")
                elif key in self._values:
                    arguments[name] = self._values[key].value
            return cls(**arguments)

        return dataclasses.replace(build(RunConfig, ""), deepspeed=_unsourced(self._free))

    def given(self) -> dict[str, str]:
        """Dotted key -> source of everything that is not a default."""
        return {key: sourced.source for key, sourced in self._values.items()} | dict(_leaf_sources(self._free, FREE))

    def _document(self, root: yaml.MappingNode, place: Place) -> None:
        self.problems += [f"{place(node)}: {fault}" for node, fault in tree.faults(root)]
        self._section(root, "", place)

    def _section(self, node: yaml.MappingNode, prefix: str, place: Place) -> None:
        for name, key_node, value in tree.entries(node):
            key = prefix + name
            if key in FIELDS:
                self._field(key, value, place)
            elif key not in (FREE, *SECTIONS):
                self.problems.append(f"{place(key_node)}: there is no key {key}; {remedy_for_unknown(key, [*FIELDS, *SECTIONS, FREE])}")
            elif isinstance(value, yaml.MappingNode):
                if key == FREE:
                    _lay(self._free, value, place)
                else:
                    self._section(value, key + ".", place)
            elif tree.kind(value) != "null":  # `train:` with every line below it commented out is an empty section
                self.problems.append(f"{place(value)}: {key} is {tree.shown(value)}, but it is a section; write {key}.KEY=VALUE, "
                                     f"in YAML the key below {key}:")

    def _field(self, key: str, node: yaml.Node, place: Place) -> None:
        try:
            self._values[key] = _Sourced(convert(node, FIELDS[key]), place(node))
        except Unfit as unfit:
            self.refused.add(key)
            if tree.kind(node) != "foreign":  # that is among the faults already
                self.problems.append(f"{place(node)}: {key} is {tree.shown(node)}, but must be {unfit}")


def _lay(below: dict[str, Any], node: yaml.MappingNode, place: Place) -> None:
    """Lays a mapping of the free section over what is there, key by key."""
    for name, _, value in tree.entries(node):
        if isinstance(value, yaml.MappingNode) and value.value:
            if not isinstance(below.get(name), dict):
                below[name] = {}
            _lay(below[name], value, place)
        else:
            below[name] = _Sourced(tree.plain(value), place(value))


def _unsourced(free: dict[str, Any]) -> dict[str, Any]:
    return {name: _unsourced(entry) if isinstance(entry, dict) else entry.value for name, entry in free.items()}


def _leaf_sources(free: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, entry in free.items():
        key = f"{prefix}.{name}"
        if isinstance(entry, dict):
            yield from _leaf_sources(entry, key)
        else:
            yield key, entry.source


def _why_unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        beside = sorted(p.name for p in path.parent.glob("*.y*ml"))
        likely = difflib.get_close_matches(path.name, beside, n=1) or beside
        return f"{path}: there is no such file; " + (f"{path.parent} holds {', '.join(likely)}" if likely else "check the path")
    if isinstance(error, OSError):
        return f"{path}: cannot be read ({error.strerror}); give a readable YAML file"
    if isinstance(error, UnicodeDecodeError):
        return f"{path}: is not UTF-8 text (byte {error.start}); give a YAML file"
    if isinstance(error, RecursionError):
        return f"{path}: is nested too deeply to be a configuration; give a run's YAML, such as ds_configs/quickstart.yaml"
    mark = getattr(error, "problem_mark", None)
    return f"{path}{f':{mark.line + 1}' if mark else ''}: is not YAML ({_reason(error)}); mend this line or the one above it"


def _reason(error: yaml.YAMLError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return getattr(error, "problem", None) or str(error).splitlines()[0]
