"""Presets of methods: what they override, what overrides them, and that each of them is valid."""

import pytest

from fedspeed.config.check import problems
from fedspeed.config.load import load
from fedspeed.config.presets import FOLDER, find_preset
from fedspeed.config.reader import Reader
from fedspeed.federation.methods.config import METHODS
from tests.config.loading import BASE, problems_of, write

PRESETS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
FS_LLM = "federation.method.name=fs_llm"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_belongs_to_a_method_and_breaks_no_rule(name):
    preset = find_preset(name)
    assert preset is not None and name in METHODS
    reader = Reader()
    preset.read(reader)
    config = reader.config()
    assert not reader.problems
    assert config.routing.mode == "plain", "as published: without masks, whatever the number of participants"
    assert reader.given() and "federation.method" not in reader.given()
    assert set(reader.given().values()) == {f"preset {name}:{line}" for line in lines_of(reader)}
    assert not [text for text in problems(config) if "model.base" not in text]


def lines_of(reader):
    return {int(place.rpartition(":")[2]) for place in reader.given().values()}


def test_a_choice_on_the_command_line_overrides_the_yaml(tmp_path):
    path = write(tmp_path, "model: {base: m}\ntrain:\n  micro_batch: 16\n  lr: 1e-3\n  weight_decay: 0.1\n")
    loaded = load(path, [FS_LLM, "train.lr=0.5"])
    train = loaded.config.train
    assert (train.micro_batch, train.lr, train.weight_decay) == (1, 0.5, 0.1)
    assert loaded.sources["train.micro_batch"].startswith("preset fs_llm:")
    assert loaded.sources["train.lr"] == "command line"
    assert loaded.preset_remarks == (
        "federation.method=fs_llm has a preset, which overrides values of the YAML file (in brackets): "
        "train.micro_batch=1 (16)",
        "federation.method=fs_llm runs with other values than those of its preset (in brackets): "
        "train.lr=0.5 (0.005)",
    )


def test_a_value_that_is_written_is_named_even_if_it_is_the_default(tmp_path):
    path = write(tmp_path, "model: {base: m}\ntrain: {local_steps: 10}\n")
    (remark,) = load(path, [FS_LLM]).preset_remarks
    assert remark.endswith("(in brackets): train.local_steps=30 (10)")


def test_a_yaml_that_names_the_method_overrides_its_preset(tmp_path):
    path = write(tmp_path, "model: {base: m}\nfederation: {method: fs_llm}\ntrain: {micro_batch: 16}\n")
    for overrides in ([], [FS_LLM]):
        loaded = load(path, overrides)
        assert (loaded.config.train.micro_batch, loaded.config.train.local_steps) == (16, 30)
        (remark,) = loaded.preset_remarks
        assert remark.endswith("(in brackets): train.micro_batch=16 (1)")
    assert load(path, ["federation.method.name=lora_average"]).config.train.local_steps == 10


def test_what_agrees_with_a_preset_is_not_remarked_on(tmp_path):
    path = write(tmp_path, "model: {base: m}\ntrain: {micro_batch: 1}\ndeepspeed: {base: zero0.json}\n")
    assert load(path, [FS_LLM]).preset_remarks == ()
    assert load(None, [BASE]).preset_remarks == ()


def test_a_preset_overrides_the_deepspeed_section(tmp_path):
    path = write(tmp_path, "model: {base: m}\ndeepspeed: {base: zero0.json, wall_clock_breakdown: true}\n")
    loaded = load(path, ["federation.method.name=zero3_offload"])
    assert loaded.config.deepspeed == {"base": "zero3_offload.json", "wall_clock_breakdown": True}
    assert "deepspeed.base=zero3_offload.json (zero0.json)" in loaded.preset_remarks[0]


@pytest.mark.parametrize(
    ("routing", "override", "mode"),
    [
        ("mode: mask", (), "mask"),
        ("mode: mask", ("routing.mode=plain",), "plain"),
        ("mode: auto", (), "auto"),
        ("transport: gloo", (), "plain"),
        ("deadline_s: 9", ("routing.transport=mpi",), "plain"),
        ("transport: tls", (), "auto"),
        ("deadline_s: 9", ("routing.transport=tls",), "auto"),
        ("deadline_s: 9", (), "plain"),
    ],
)
def test_a_preset_does_not_lower_what_protects_updates(tmp_path, routing, override, mode):
    path = write(tmp_path, f"model: {{base: m, dtype: bf16}}\nrouting: {{{routing}}}\n")
    assert load(path, [FS_LLM, *override]).config.routing.mode == mode


def test_an_unknown_method_is_refused_as_before(tmp_path):
    (text,) = problems_of(None, BASE, "federation.method.name=../../x")
    assert "federation.method" in text
