"""A run's YAML and `key=value` overrides to a typed `RunConfig`, with the place every value came from.

All problems are collected and raised as one `ConfigError`, so that a file is mended once and not once per
mistake.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedspeed.config import paths
from fedspeed.config.check import conflicts
from fedspeed.config.reader import FIELDS, FREE, SECTIONS, Reader
from fedspeed.config.run import RunConfig
from fedspeed.config.tree import COMMAND_LINE
from fedspeed.errors import ConfigError

__all__ = ["COMMAND_LINE", "DEFAULT", "FIELDS", "FREE", "SECTIONS", "Loaded", "load", "with_values"]

DEFAULT = "default"


@dataclass(frozen=True)
class Loaded:
    """A checked configuration.

    Args:
        config: the values.
        sources: dotted key -> `default`, `FILE:LINE` or `command line`; of a value with values of its own,
            all its places. What was given inside such a value has an entry too. The deepspeed section has an
            entry for each of its leaves, and the one entry `deepspeed` if it is empty.
        path: the YAML, None if there was none.
        written: dotted key -> text, of inputs whose path was written in another way than `config` has it (see
            `paths.found`).
    """

    config: RunConfig
    sources: dict[str, str]
    path: Path | None
    written: dict[str, str] = field(default_factory=dict)

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
        """Say in brackets where the input `key` was looked for, which is nowhere; empty for an absolute
        path.
        """
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
    reader = Reader()
    readable = path is None or reader.read_file(path)
    for override in overrides:
        reader.read_override(override)
    config = reader.config()
    given = reader.given()
    problems = list(dict.fromkeys(reader.problems))
    if readable:
        problems += _cross_section_problems(config, given, reader.refused, path)
    if problems:
        raise ConfigError(problems)
    sources = dict.fromkeys(FIELDS, DEFAULT) | given
    moved = _moved(config, sources, path)
    if not config.deepspeed:
        sources[FREE] = DEFAULT
    written = {key: text for key, text in _inputs(config) if key in moved}
    return Loaded(with_values(config, moved), sources, path, written)


def _inputs(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of the keys that name files and folders to be read, but for those that hold a word
    instead.
    """
    for key, known in FIELDS.items():
        text = operator.attrgetter(key)(config)
        if known.path is not None and text not in known.path:
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
        changed = replace(getattr(config, section), **{name: value})
        config = replace(config, **{section: changed})
    return config


def _cross_section_problems(
    config: RunConfig, given: dict[str, str], refused: set[str], path: Path | None
) -> list[str]:
    """What `check` finds, with places. A rule about a key whose value was refused has nothing to add and is
    left out.
    """

    def places(keys: Sequence[str]) -> str:
        found = [source for wanted in keys if (source := _source(wanted, given))]
        return " and ".join(dict.fromkeys(found)) or str(path or COMMAND_LINE)

    heard = [conflict for conflict in conflicts(config) if refused.isdisjoint(conflict.keys)]
    return [f"{places(conflict.keys)}: {conflict.text}" for conflict in heard]


def _source(wanted: str, given: dict[str, str]) -> str:
    """Return where a key, or the first one below it, was given; empty if nothing was."""
    return next((source for key, source in given.items() if f"{key}.".startswith(f"{wanted}.")), "")
