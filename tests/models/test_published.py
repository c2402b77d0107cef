"""Models with published dimensions, from their config.json alone: their known sizes, `fedspeed plan`, and
`--dry-run` with weights that are drawn.
"""

import json

import pytest

from fedspeed.cli import main
from fedspeed.models.catalogue import shape_of
from fedspeed.models.families.registry import FAMILIES
from tests.conftest import ROOT

CONFIGS = ROOT / "tests" / "models" / "configs"
# Parameters as their publishers count them, tied ones once.
TOTALS = {
    "Llama-3.2-1B": 1_235_814_400,
    "Mistral-7B-v0.3": 7_248_023_552,
    "OLMo-2-7B": 7_298_617_344,
    "Phi-3.5-mini": 3_821_079_552,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-8B": 8_190_735_360,
    "SmolLM2-135M": 134_515_008,
    "SmolLM3-3B": 3_075_098_624,
    "gemma-3-1b": 999_885_952,
    "gpt2": 124_439_808,
    "granite-3.1-2b": 2_533_531_648,
    "granite-3.1-8b": 8_170_848_256,
    "phi-4": 14_659_507_200,
    "pythia-1.4b": 1_414_647_808,
    "pythia-6.9b": 6_857_302_016,
}
# The smallest of each family.
ONE_EACH = (
    "SmolLM2-135M",
    "Qwen2.5-0.5B",
    "gpt2",
    "Mistral-7B-v0.3",
    "Qwen3-8B",
    "Qwen3-30B-A3B",
    "gemma-3-1b",
    "Phi-3.5-mini",
    "OLMo-2-7B",
    "pythia-1.4b",
    "SmolLM3-3B",
    "granite-3.1-2b",
)


def test_every_family_has_a_published_model_here():
    assert {path.parent.name for path in CONFIGS.glob("*/config.json")} == set(TOTALS)
    assert {shape_of(str(CONFIGS / name)).family for name in ONE_EACH} == set(FAMILIES)


@pytest.mark.parametrize("name", TOTALS)
def test_sizes_are_those_that_were_published(name):
    assert shape_of(str(CONFIGS / name)).total == TOTALS[name]


@pytest.mark.parametrize("name", ONE_EACH)
def test_it_is_planned(name, capsys):
    hosts = str(ROOT / "hostfiles" / "hetero10")
    words = ["--hostfile", hosts, "--model", str(CONFIGS / name), "--tokens", "256"]
    assert main(["plan", *words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["task"]["parameters"] == TOTALS[name] >= plan["task"]["active_parameters"]


@pytest.mark.parametrize("name", ONE_EACH)
def test_the_dry_run_accepts_it(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        f"model.base={CONFIGS / name}",
        "model.init=random",
        "model.tokenizer=bytes",
        "data.max_rows=60",
        "data.split=iid",
        "data.max_tokens=64",
    ]
    assert main(["run", "--dry-run", *words]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert f"({shape_of(str(CONFIGS / name)).family}, weights drawn from run.seed)" in said
