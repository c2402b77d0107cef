"""Presets of methods: YAML files with the settings that a published method was described with. Where
`federation.method.name=NAME` stands on the command line, they override the YAML file, so that the method runs
as published, except for how updates are protected; keys of the command line override them. Where the YAML
file names the method, its other keys override them.
"""

import operator
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspeed.config.deepspeed_rules import at
from fedspeed.config.reader import DEEPSPEED, Reader
from fedspeed.config.run import RunConfig
from fedspeed.config.spelling import flow
from fedspeed.federation.methods.config import METHODS

FOLDER = Path(__file__).resolve().parents[1] / "federation" / "methods" / "presets"


@dataclass(frozen=True)
class Preset:
    """The preset of a method.

    Attributes:
        method: its name. path: of the YAML file.
    """

    method: str
    path: Path

    def read(self, reader: Reader, *, routed: bool = False) -> None:
        """Read the file; sources name it as `preset METHOD:LINE`.

        Args:
            routed: whether the user says how updates are protected (`says_protection`), which a preset
                never changes; its section `routing` is then left out.
        """
        reader.read_file(self.path, f"preset {self.method}", without="routing" if routed else "")

    def remarks(self, config: RunConfig, before: RunConfig, given: Collection[str]) -> tuple[str, ...]:
        """Return remarks about where the preset and what the user has written override each other.

        Args:
            config: of the run. before: the same without the preset. given: dotted keys that the user gives.
        """
        reader = Reader()
        self.read(reader)
        published = reader.config()
        overridden = []
        overriding = []
        for key in reader.given():
            own, used, written = (_value(of, key) for of in (published, config, before))
            if used != own:
                overridden.append(f"{key}={flow(used)} ({flow(own)})")
            elif written != own and key in given:
                overriding.append(f"{key}={flow(own)} ({flow(written)})")
        setting = f"federation.method={self.method}"
        texts = {
            f"{setting} has a preset, which overrides values of the YAML file (in brackets)": overriding,
            f"{setting} runs with other values than those of its preset (in brackets)": overridden,
        }
        return tuple(f"{text}: {', '.join(values)}" for text, values in texts.items() if values)


def says_protection(given: Collection[str], config: RunConfig) -> bool:
    """Return whether a configuration without a preset says how updates are protected: by routing.mode, or by
    a transport between organisations.

    Args:
        given: the dotted keys that it gives.
    """
    return "routing.mode" in given or config.routing.between_organisations


def _value(config: RunConfig, key: str) -> Any:
    """Return the value of a dotted key; None for a key of the deepspeed section that is not given."""
    section, _, name = key.partition(".")
    return at(config.deepspeed, name) if section == DEEPSPEED else operator.attrgetter(key)(config)


def find_preset(method: str) -> Preset | None:
    """Return the preset of a method; None if it has none, or if there is no such method."""
    path = FOLDER / f"{method}.yaml"
    return Preset(method, path) if method in METHODS and path.is_file() else None
