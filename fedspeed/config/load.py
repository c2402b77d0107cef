"""Loading of a run's YAML file and `key=value` overrides as a typed `RunConfig`, with every value's source.

All problems are collected and raised as one `ConfigError`, so that a user sees every mistake at once.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedspeed.config import paths
from fedspeed.config.check import conflicts
from fedspeed.config.presets import Preset, find_preset, says_protection
from fedspeed.config.reader import DEEPSPEED, FIELDS, SECTIONS, Reader
from fedspeed.config.run import RunConfig
from fedspeed.config.tree import COMMAND_LINE
from fedspeed.errors import ConfigError

__all__ = [
    "COMMAND_LINE",
    "DEEPSPEED",
    "DEFAULT",
    "FIELDS",
    "SECTIONS",
    "Loaded",
    "load",
    "repeated_keys",
    "with_values",
]

DEFAULT = "default"
METHOD = "federation.method"
Paths = str | tuple[str, ...]


@dataclass(frozen=True)
class Loaded:
    """Hold a checked configuration and where its values came from.

    Args:
        config: the values, with resolved paths.
        sources: dotted key -> `default`, `preset METHOD:LINE`, `FILE:LINE` or `command line`. A nested value
            lists the sources of all its leaves, and each leaf has an entry of its own. So has each leaf of
            the deepspeed section; an empty one has the single entry `deepspeed`.
        path: the YAML file; None if there was none.
        written: dotted key -> the path or paths as they were written, for inputs that `paths` has
            resolved.
        preset_remarks: how the preset of the run's method and what the user has written override each other.
    """

    config: RunConfig
    sources: dict[str, str]
    path: Path | None
    written: Mapping[str, Paths] = field(default_factory=dict)
    preset_remarks: tuple[str, ...] = ()

    @property
    def as_written(self) -> RunConfig:
        """Return the configuration with paths as they were written, independent of the working folder."""
        return with_values(self.config, self.written)

    @property
    def places(self) -> dict[str, str]:
        """Return dotted key -> absolute path of every input that is an existing file or folder."""
        return {key: path for key, value in _inputs(self.config) if (path := paths.existing_paths(value))}

    @property
    def folder(self) -> Path:
        """Return the folder that a relative `deepspeed.base` starts from.

        It is the folder of the YAML file, or the working folder where the command line gives the base.
        """
        if self.path is None or self.sources.get(f"{DEEPSPEED}.base") == COMMAND_LINE:
            return Path.cwd()
        return self.path.parent

    def searched(self, key: str) -> str:
        """Return, in brackets, the folders in which the missing input `key` was looked for.

        Empty for an absolute path.
        """
        text = operator.attrgetter(key)(self.as_written)
        if Path(text).is_absolute() or text.startswith("~"):
            return ""
        folders = [Path.cwd()]
        if self.path is not None and self.sources.get(key) != COMMAND_LINE:
            folders.insert(0, self.path.parent.resolve())
        return f" (looked for in {' and '.join(map(str, dict.fromkeys(folders)))})"

    @property
    def run_folder(self) -> Path:
        """Return the folder of the run: run.out/run.name, with the name of the YAML file as default."""
        return Path(self.config.run.out) / (self.config.run.name or (self.path.stem if self.path else "run"))


def load(path: Path | None, overrides: Sequence[str] = ()) -> Loaded:
    """Read a run's YAML file, apply the preset of its method, if that has one, and the overrides.

    Args:
        path: the YAML file, None for the defaults alone.
        overrides: `key=value` with a dotted key; the value is read as YAML, and the last one of a key counts.

    Raises:
        ConfigError: with every problem of the file, of the overrides and between the sections.
    """
    reader, readable = _read(path, overrides)
    preset = find_preset(reader.named(METHOD))
    if preset is not None:
        before = reader.config()
        written_keys = reader.given().keys()
        routed = says_protection(written_keys, before)
        reader, readable = _read(path, overrides, preset, routed=routed)
    config = reader.config()
    given = reader.given()
    problems = list(dict.fromkeys(reader.problems))
    if readable:
        problems += _cross_section_problems(config, given, reader.refused, path)
    if problems:
        raise ConfigError(problems)
    sources = dict.fromkeys(FIELDS, DEFAULT) | given
    resolved = _resolved(config, sources, path)
    if not config.deepspeed:
        sources[DEEPSPEED] = DEFAULT
    written = {key: text for key, text in _inputs(config) if key in resolved}
    config = with_values(config, resolved)
    remarks = () if preset is None else preset.remarks(config, before, written_keys)
    return Loaded(config, sources, path, written, remarks)


def _read(
    path: Path | None, overrides: Sequence[str], preset: Preset | None = None, *, routed: bool = False
) -> tuple[Reader, bool]:
    """Read all documents of a run, in the order in which they override each other; returns (reader, whether
    the YAML file holds a configuration).

    A preset overrides defaults. Where the command line chooses its method, it overrides the YAML file too.

    Args:
        routed: see `Preset.read`.
    """
    reader = Reader()
    over_yaml = preset is not None and _method_in(path) != preset.method
    if preset is not None and not over_yaml:
        preset.read(reader, routed=routed)
    readable = path is None or reader.read_file(path)
    if preset is not None and over_yaml:
        preset.read(reader, routed=routed)
    for override in overrides:
        reader.read_override(override)
    return reader, readable


def _method_in(path: Path | None) -> str:
    """Return the name of the method that a YAML file chooses; empty if it chooses none."""
    reader = Reader()
    if path is not None:
        reader.read_file(path)
    return reader.named(METHOD)


def repeated_keys(overrides: Sequence[str]) -> list[str]:
    """Return a message for each key that the overrides of a command line give more than once."""
    by_key: dict[str, list[str]] = {}
    for override in overrides:
        by_key.setdefault(override.partition("=")[0].strip(), []).append(override)
    return [
        f"{COMMAND_LINE}: {key} is given {len(given)} times ({', '.join(given)}); leave one of them"
        for key, given in by_key.items()
        if len(given) > 1
    ]


def _inputs(config: RunConfig) -> Iterator[tuple[str, Paths]]:
    """Yield (dotted key, path or paths) of the keys that name files and folders to read."""
    for key, field_ in FIELDS.items():
        value = operator.attrgetter(key)(config)
        if field_.path is not None and value not in field_.path:
            yield key, value


def _resolved(config: RunConfig, sources: dict[str, str], path: Path | None) -> dict[str, Paths]:
    """Return dotted key -> path or paths of the inputs that `paths.resolve` changes."""
    changed: dict[str, Paths] = {}
    for key, value in _inputs(config):
        folder = None if sources[key] == COMMAND_LINE or path is None else path.parent
        if isinstance(value, str) and FIELDS[key].type is str:
            resolved: Paths = paths.resolve(value, folder)
        else:
            resolved = paths.resolve_inputs(value, folder)
        if resolved != value:
            changed[key] = resolved
    return changed


def with_values(config: RunConfig, values: Mapping[str, Paths]) -> RunConfig:
    """Return the configuration with some values replaced, given by keys SECTION.NAME."""
    for key, value in values.items():
        section, _, name = key.partition(".")
        changed = replace(getattr(config, section), **{name: value})
        config = replace(config, **{section: changed})
    return config


def _cross_section_problems(
    config: RunConfig, given: dict[str, str], refused: set[str], path: Path | None
) -> list[str]:
    """Return the conflicts between keys, each with the places of the keys.

    Conflicts of a key with an invalid value are left out: it has a message already.
    """

    def places(keys: Sequence[str]) -> str:
        sources = [source for key in keys if (source := _source(key, given))]
        return " and ".join(dict.fromkeys(sources)) or str(path or COMMAND_LINE)

    relevant = [conflict for conflict in conflicts(config) if refused.isdisjoint(conflict.keys)]
    return [f"{places(conflict.keys)}: {conflict.text}" for conflict in relevant]


def _source(wanted: str, given: dict[str, str]) -> str:
    """Return where a key, or the first key below it, was given; empty for a default."""
    return next((source for key, source in given.items() if f"{key}.".startswith(f"{wanted}.")), "")
