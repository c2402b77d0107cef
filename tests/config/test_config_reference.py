"""What every key means: comments of `--print-config`, and docs/config.md."""

from pathlib import Path

import pytest
import yaml

from fedspeed.config.deepspeed import merge
from fedspeed.config.load import FIELDS, SECTIONS, load
from fedspeed.config.reference import markdown, meaning, section_meaning
from fedspeed.config.show import as_dict, render
from tests.conftest import ROOT

SHIPPED = sorted((ROOT / "ds_configs").glob("*.yaml"))


def explained(path: Path | None, *overrides: str) -> tuple:
    loaded = load(path, overrides)
    return loaded, render(
        loaded, merge(loaded.config.deepspeed, loaded.config, loaded.folder), explained=True
    )


def test_the_reference_is_current():
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == markdown(), (
        "docs/config.md is older than the configuration's dataclasses; write it anew: "
        "python -m fedspeed config-reference --out docs/config.md"
    )


@pytest.mark.parametrize("key", FIELDS)
def test_every_key_says_what_it_means(key):
    assert len(FIELDS[key].help) >= 10 and f"| `{key}` | " in markdown()


@pytest.mark.parametrize("name", [*SECTIONS, "deepspeed"])
def test_every_section_says_what_it_is_about(name):
    assert f"## {name}\n\n{section_meaning(name)}" in markdown()


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("train.lr", "[a number, at least 0]"),
        ("adapter.method", "[one of lora, blocks, full]"),
        ("monitor.plot", "[true or false]"),
        ("routing.deadline_s", "in seconds]"),
        ("engine.base_gib", "in GiB]"),
        ("routing.cell_kib", "in KiB]"),
    ],
)
def test_bounds_choices_and_units_are_said(key, words):
    assert meaning(key).startswith(FIELDS[key].help) and meaning(key).endswith(words)


def test_a_printed_configuration_explains_each_value_above_it():
    _, text = explained(ROOT / "ds_configs" / "gsm8k.yaml")
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  lr: "))
    assert lines[at - 1] == "  # peak learning rate of the local optimizer [a number, at least 0]"
    assert lines[lines.index("train:") - 1] == f"# {section_meaning('train')}"
    assert max(len(line) for line in lines if line.lstrip().startswith("#") and "http" not in line) <= 110
    assert (
        "initial_scale_power: 12" in text and sum("initial_scale_power" in line for line in lines) == 2
    )  # not ours to explain


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_an_explained_configuration_loads_back(path, tmp_path):
    loaded, text = explained(path, "run.name=no", "train.lr=1e-5")
    copy = tmp_path / "copy.yaml"
    copy.write_text(text, encoding="utf-8")
    assert load(copy).config == loaded.config
    assert yaml.safe_load(text) == as_dict(loaded.config)
