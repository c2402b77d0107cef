"""The lines that the dry run prints about a valid run: its execution, and settings that are probably a
mistake.
"""

import json

import pytest
import yaml

from fedspeed.config.load import load
from fedspeed.errors import FedSpeedError
from fedspeed.session.preflight import check, look_inside
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


@pytest.fixture
def found(said, tmp_path):
    """Return a function that gives the lines of a dry run of `fedbiot` with the heavy libraries."""
    rows = '{"instruction": "add", "output": "3"}\n'
    (tmp_path / "public.jsonl").write_text(rows * 3)
    fixed = ("federation.method.name=fedbiot", "federation.method.adapter_blocks=1", "model.dtype=fp32")
    return lambda text: look_inside(
        load(tmp_path / "run.yaml", [*fixed, f"federation.public_rows={text}"])
    ).splitlines()


def test_it_says_which_blocks_clients_have_and_what_the_server_trains_on(found):
    lines = found("public.jsonl")
    assert "blocks   a client has 2 of the base's 2 blocks (0, 1)" in lines, "the emulator drops none of one"
    assert "public   the server trains on 3 rows, all kept whole" in lines


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "rows.jsonl: no such file"),
        ("", "rows.jsonl: the file holds no rows"),
        ("text", "rows.jsonl:1: not JSON"),
        ('{"question": "a"}\n', "no field 'instruction'"),
    ],
)
def test_it_reads_the_public_rows(found, tmp_path, content, message):
    if content is not None:
        (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(FedSpeedError, match=message):
        found("rows.jsonl")
    with pytest.raises(FedSpeedError, match="is no file"):
        found("model")
