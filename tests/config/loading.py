"""Configuration files that tests write, and the problems that loading them reports."""

from pathlib import Path

import pytest

from fedspeed.config.load import load
from fedspeed.errors import ConfigError

BASE = "model.base=some/model"


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path: Path | None, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return caught.value.problems
