"""The loader of configurations: values, and the file and line that each value comes from."""

from pathlib import Path

import pytest

from fedspeed.config.load import FIELDS, Loaded, load
from fedspeed.config.run import RunConfig
from fedspeed.data.config import local_steps_of
from tests.config.loading import BASE, write


def test_defaults_and_their_sources():
    loaded = load(None, [BASE])
    assert loaded.config.train == RunConfig().train
    assert loaded.config.model.base == "some/model"
    assert loaded.sources["train.lr"] == "default"
    assert loaded.sources["model.base"] == "command line"
    assert loaded.sources["deepspeed"] == "default"
    assert set(loaded.sources) == {*FIELDS, "deepspeed"}


def test_sources_name_file_and_line(tmp_path):
    path = write(
        tmp_path,
        "model:\n  base: m\ntrain:\n  lr: 1e-3\n  micro_batch: 2\ndeepspeed:\n  zero_optimization:\n    "
        "stage: 2\n  aio: {}\n",
    )
    loaded = load(path, ["train.micro_batch=8", "deepspeed.zero_optimization.overlap_comm=true"])
    assert loaded.config.train.micro_batch == 8
    assert loaded.config.deepspeed == {"zero_optimization": {"stage": 2, "overlap_comm": True}, "aio": {}}
    assert {key: source for key, source in loaded.sources.items() if source != "default"} == {
        "model.base": f"{path}:2",
        "train.lr": f"{path}:4",
        "train.micro_batch": "command line",
        "deepspeed.zero_optimization.stage": f"{path}:8",
        "deepspeed.zero_optimization.overlap_comm": "command line",
        "deepspeed.aio": f"{path}:9",
    }


def test_folder_is_where_a_relative_base_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(None, [BASE]).folder == tmp_path
    assert Loaded(RunConfig(), {}, Path("ds_configs/x.yaml")).folder == Path("ds_configs")


@pytest.mark.parametrize(
    ("written", "expected"),
    [("1e-3", 0.001), ("1.0e-3", 0.001), ("2", 2.0), (".5", 0.5), ("1E-2", 0.01), ("0.25", 0.25)],
)
def test_numbers_of_yaml_1_2_are_floats(tmp_path, written, expected):
    lr = load(write(tmp_path, f"model: {{base: m}}\ntrain:\n  lr: {written}\n")).config.train.lr
    assert lr == expected and type(lr) is float
    assert load(None, [BASE, f"train.lr={written}"]).config.train.lr == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("no", "no"),
        ("2026-11-23", "2026-11-23"),
        ("1:30", "1:30"),
        ("007", "007"),
        ("1e3", "1e3"),
        ('"true"', "true"),
        ('""', ""),
        ("", ""),
    ],
)
def test_text_stays_as_it_was_written(written, expected):
    assert load(None, [BASE, f"run.name={written}"]).config.run.name == expected


def test_a_number_may_stand_for_a_text_field(tmp_path):
    path = write(tmp_path, "model: {base: m}\nrun:\n  name: 2\n")
    assert load(path).config.run.name == "2"


def test_numbers_in_the_deepspeed_section_keep_their_type():
    loaded = load(
        None,
        [
            BASE,
            "deepspeed.zero_optimization={reduce_bucket_size: 2e6, overlap_comm: true}",
            "deepspeed.log_level='7'",
        ],
    )
    assert loaded.config.deepspeed == {
        "zero_optimization": {"reduce_bucket_size": 2e6, "overlap_comm": True},
        "log_level": "7",
    }


def test_a_section_whose_lines_are_all_commented_out_is_empty(tmp_path):
    assert (
        load(write(tmp_path, "model: {base: m}\ntrain:\n  # lr: 1\ndeepspeed:\n")).config
        == load(None, ["model.base=m"]).config
    )


def test_overrides_reach_everywhere_and_the_last_one_counts():
    loaded = load(
        None,
        [
            BASE,
            "train.lr=1",
            "train.lr=2",
            "data={clients: 5, split: lda, task: file}",
            "deepspeed.base=x.json",
            "train.local_steps_by_cluster={a: 5, b: 4}",
            "train.local_steps_by_cluster.b=3",
            "data.path=s3=x",
        ],
    )
    assert loaded.config.train.lr == 2.0
    assert (loaded.config.data.clients, loaded.config.data.split, loaded.config.data.path) == (
        5,
        "lda",
        "s3=x",
    )
    assert loaded.config.deepspeed == {"base": "x.json"}
    assert [local_steps_of(loaded.config.train, name) for name in ("a", "b", "c")] == [
        5,
        3,
        loaded.config.train.local_steps,
    ]


def test_an_override_replaces_a_scalar_by_a_block_and_back():
    assert load(None, [BASE, "deepspeed.fp16=null", "deepspeed.fp16.hysteresis=1"]).config.deepspeed == {
        "fp16": {"hysteresis": 1}
    }
    loaded = load(None, [BASE, "deepspeed.fp16.hysteresis=1", "deepspeed.fp16=null"])
    assert loaded.config.deepspeed == {"fp16": None}
    assert "deepspeed.fp16.hysteresis" not in loaded.sources
