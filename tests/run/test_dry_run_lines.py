"""The lines that the dry run prints about a valid run: its execution, and settings that are probably a
mistake.
"""

import json

import pytest
import yaml

from fedspeed.config.load import load
from fedspeed.errors import FedSpeedError
from fedspeed.session.preflight import check
from tests.run.launched import LLAMA, SETTINGS


@pytest.fixture
def said(tmp_path, monkeypatch):
    """Return a function that gives the lines of a dry run in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    settings = {**SETTINGS, "model": {"base": "model", **SETTINGS["model"]}, "monitor": {"progress": False}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr("fedspeed.cluster.local_ranks.usable_cores", lambda: 2)
    return lambda *arguments: check(load(tmp_path / "run.yaml", arguments), None).splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "DeepSpeed ZeRO-0, "),
        (("deepspeed.base=zero2.json",), "DeepSpeed ZeRO-2, "),
        (
            ("engine.tier=nvme",),
            "the base on NVMe, one copy a node (engine.tier=nvme), layer by layer; what trains by DeepSpeed "
            "ZeRO-0, ",
        ),
        (("engine.tier=ram",), "host RAM"),
        (("engine.tier=resident",), "whole on every device (engine.tier=resident)"),
        (
            ("deepspeed.base=zero3.json",),
            "the base divided over each cluster's ranks (engine.tier=cluster), layer by layer; what trains "
            "by DeepSpeed ZeRO-2, ",
        ),
        (("deepspeed.base=zero3.json", "engine.tier=stock"), "DeepSpeed ZeRO-3, "),
        (("deepspeed.base=zero3.json", "adapter.targets=[q_proj,embed_tokens]"), "DeepSpeed ZeRO-3, "),
        (("deepspeed.base=zero3.json", "adapter.method=full"), "DeepSpeed ZeRO-3, "),
        (
            ("engine.pipeline=client", "cluster.ranks_per_client=2", "engine.tier=ram", "data.clients=1"),
            "a pipeline over each client's ranks, whose parts of the base are loaded from their RAM",
        ),
    ],
)
def test_the_execution_is_reported_by_its_tier(said, arguments, message):
    [line] = [line for line in said(*arguments) if line.startswith("engine ")]
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train.lr=0",), "train.lr=0: no weight changes"),
        (("cluster.local_ranks=3",), "3 ranks on 2 cores"),
        (("cluster.local_ranks=2",), None),
        ((), None),
    ],
)
def test_settings_that_are_probably_a_mistake_are_noted(said, arguments, message):
    notes = [line for line in said(*arguments) if line.startswith("note ")]
    assert len(notes) == (message is not None) and all(message in note for note in notes)


@pytest.mark.parametrize("arguments", [(), ("engine.tier=ram",)])
def test_a_method_that_asks_for_more_than_the_engine_can_is_refused(said, monkeypatch, arguments):
    from fedspeed.federation.methods.lora_average.method import LoraAverage

    said(*arguments)
    monkeypatch.setattr(LoraAverage, "needs", frozenset({"gradients", "split"}))
    with pytest.raises(FedSpeedError, match="lora_average needs an engine that is capable of split"):
        said(*arguments)
