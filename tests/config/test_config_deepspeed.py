"""The deepspeed section: base file, filling of `auto`, conflicts, and our tables against the installed
DeepSpeed.
"""

import dataclasses
import json
from pathlib import Path

import pytest

from fedspeed.config import deepspeed_schema as schema
from fedspeed.config.deepspeed import ENGINE_AUTOS, merge, zero_stage
from fedspeed.config.load import load
from fedspeed.config.run import RunConfig
from fedspeed.errors import ConfigError
from tests.config.deepspeed_conflicts import CONFLICTS

ROOT = Path(__file__).resolve().parents[2]
AUTO = "auto"


def config(*overrides: str) -> RunConfig:
    return load(None, ["model.base=m", *overrides]).config


def conflicts_of(section: dict, *overrides: str, root: Path = ROOT) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        merge(section, config(*overrides), root)
    return caught.value.problems


def test_an_empty_section_is_zero_0_and_silent():
    assert merge({}, config("model.dtype=fp32", "train.micro_batch=3"), ROOT) == {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


@pytest.mark.parametrize(
    ("dtype", "fp16", "bf16"), [("fp32", False, False), ("fp16", True, False), ("bf16", False, True)]
)
def test_auto_is_filled_from_the_run(dtype, fp16, bf16):
    section = {
        "train_micro_batch_size_per_gpu": AUTO,
        "gradient_accumulation_steps": AUTO,
        "gradient_clipping": AUTO,
        "train_batch_size": AUTO,
        "fp16": {"enabled": AUTO, "hysteresis": 1},
        "bf16": {"enabled": AUTO},
        "zero_allow_untested_optimizer": AUTO,
        "optimizer": {"type": AUTO, "params": {"lr": AUTO, "betas": AUTO, "eps": AUTO, "weight_decay": AUTO}},
        "managed_gradient_accumulation": False,
        "steps_per_print": 5,
    }
    merged = merge(
        section,
        config(f"model.dtype={dtype}", "train.micro_batch=2", "train.accumulation=3", "train.clip=0.5"),
        ROOT,
    )
    assert merged == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "fp16": {"enabled": fp16, "hysteresis": 1},
        "bf16": {"enabled": bf16},
        "managed_gradient_accumulation": False,
        "steps_per_print": 5,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    assert section["bf16"] == {"enabled": AUTO}  # the caller's section is left alone


def test_only_the_chosen_precision_block_is_added():
    assert merge({}, config("model.dtype=bf16"), ROOT)["bf16"] == {"enabled": True}
    assert "fp16" not in merge({}, config("model.dtype=bf16"), ROOT)


def test_the_section_lies_on_top_of_its_base(tmp_path):
    base = {
        "zero_optimization": {"stage": 3, "overlap_comm": True, "offload_param": {"device": "cpu"}},
        "wall_clock_breakdown": True,
        "log_level": None,
    }
    (tmp_path / "b.json").write_text(json.dumps(base))
    section = {"base": "b.json", "zero_optimization": {"overlap_comm": False, "offload_param": None}}
    merged = merge(section, config(), tmp_path)
    assert merged["zero_optimization"] == {"stage": 3, "overlap_comm": False}
    assert merged["wall_clock_breakdown"] is True and "log_level" not in merged
    assert zero_stage(merged) == 3 and zero_stage({}) == 0
    assert section["base"] == "b.json"


def test_null_lets_go_of_a_conflict_in_the_base(tmp_path):
    (tmp_path / "b.json").write_text(json.dumps({"scheduler": {"type": "WarmupLR"}, "train_batch_size": 64}))
    assert "scheduler" not in merge(
        {"base": "b.json", "scheduler": None, "train_batch_size": None}, config(), tmp_path
    )


def test_where_a_base_is_looked_for(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "own.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert zero_stage(merge({"base": "own.json"}, config(), tmp_path)) == 1
    assert zero_stage(merge({"base": "zero2.json"}, config(), ROOT / "ds_configs")) == 2
    assert zero_stage(merge({"base": "ds_configs/zero2.json"}, config(), tmp_path)) == 2
    assert zero_stage(merge({"base": "zero2.json"}, config(), tmp_path)) == 2
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert zero_stage(merge({"base": "zero2.json"}, config(), tmp_path)) == 1
    assert zero_stage(merge({"base": str(ROOT / "ds_configs" / "zero3.json")}, config(), tmp_path)) == 3
    [problem] = conflicts_of({"base": "zero9.json"}, root=tmp_path)
    assert "deepspeed.base is zero9.json, but there is no such file" in problem
    for folder in (tmp_path, tmp_path / "here", ROOT, ROOT / "ds_configs"):
        assert str(folder / "zero9.json") in problem


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"a": 1,\n "b": }', ":2: is not JSON"),
        ("", ":1: is not JSON"),
        ("[1]", "holds list, not the keys of a DeepSpeed configuration"),
        ('{"fp16": {"enabled": 1, "enabled": 2}}', "'enabled' is given twice"),
        ('{"base": "other.json"}', "b.json: base is not a key of DeepSpeed 0.19.8"),
    ],
)
def test_bad_base_files(tmp_path, content, said):
    (tmp_path / "b.json").write_text(content)
    [problem] = conflicts_of({"base": "b.json"}, root=tmp_path)
    assert said in problem and "b.json" in problem


def test_a_base_that_is_no_name():
    assert "deepspeed.base is 3, but must name a JSON file" in conflicts_of({"base": 3})[0]


@pytest.mark.parametrize(("section", "overrides", "said"), CONFLICTS)
def test_each_conflict(section, overrides, said):
    with pytest.raises(ConfigError) as caught:
        merge(section, dataclasses.replace(config(*overrides), deepspeed=section), ROOT)
    [problem] = caught.value.problems
    assert problem.startswith("deepspeed.") and said in problem


def test_all_conflicts_come_at_once_and_name_their_file(tmp_path):
    (tmp_path / "b.json").write_text(
        json.dumps({
            "train_micro_batch_size_per_gpu": 8,
            "scheduler": {"type": "WarmupLR"},
            "elasticity": {},
            "zero_optimization": {"stage": 1, "stge": 1},
        })
    )
    problems = conflicts_of(
        {
            "base": "b.json",
            "bf16": {"enabled": True},
            "zero_optimization": {"offload_param": {"device": "cpu"}},
        },
        "model.dtype=fp32",
        root=tmp_path,
    )
    assert [problem.split(" is ")[0].split(" was ")[0].split(" has ")[0] for problem in problems] == [
        "b.json: elasticity",
        "b.json: zero_optimization.stge",
        "b.json: scheduler",
        "b.json: train_micro_batch_size_per_gpu",
        "deepspeed.bf16.enabled",
        "deepspeed.zero_optimization.offload_param.device=cpu needs stage 3, but zero_optimization.stage",
    ]


def test_a_block_that_is_switched_off_is_harmless():
    section = {
        "tensorboard": {"enabled": False},
        "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 1, "zero_quantized_weights": False},
        "optimizer": {"type": "adamw", "params": {"lr": 1e-3, "torch_adam": True, "betas": [0.9, 0.999]}},
    }
    merged = merge(section, config(), ROOT)
    assert merged["tensorboard"] == {"enabled": False} and "optimizer" not in merged


# --- against the installed DeepSpeed
# ---------------------------------------------------------------------------------


def names_of(model) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def test_our_tables_are_those_of_the_installed_deepspeed():
    from deepspeed.runtime import config as ds
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    zero = schema.SCHEMA["zero_optimization"]
    assert set(zero) == names_of(DeepSpeedZeroConfig)
    assert set(zero["offload_param"]) == names_of(DeepSpeedZeroOffloadParamConfig)
    assert set(zero["offload_optimizer"]) == names_of(DeepSpeedZeroOffloadOptimizerConfig)
    assert set(schema.SCHEMA["fp16"]) == names_of(DeepSpeedFP16Config)
    assert set(schema.SCHEMA["bf16"]) == names_of(DeepSpeedBF16Config)
    assert set(schema.SCHEMA["aio"]) == set(AIO_DEFAULT_DICT)
    assert set(ds._REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(schema.REMOVED)
    assert {f"zero_optimization.{key}" for key in ds._REMOVED_ZERO_CONFIG_KEYS} <= set(schema.REMOVED)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_shipped_jsons_are_valid_deepspeed_once_the_engine_has_decided(path, dtype, tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfig

    pipeline = ["engine.pipeline=client"] if path.stem == "pipeline" else []
    merged = merge(
        {"base": path.name}, config(f"model.dtype={dtype}", "train.clip=1", *pipeline), path.parent
    )
    undecided = set()

    def decide(block: dict, prefix: str = "") -> None:
        for name, value in block.items():
            if isinstance(value, dict):
                decide(value, f"{prefix}{name}.")
            elif value == AUTO:
                undecided.add(prefix + name)
                block[name] = str(tmp_path) if name == "nvme_path" else 1000

    decide(merged)
    assert undecided <= ENGINE_AUTOS
    parsed = DeepSpeedConfig(merged)
    assert parsed.zero_config.stage == zero_stage(merged) == (0 if pipeline else int(path.stem[4]))
    assert (parsed.float16_config.enabled, parsed.bfloat16_config.enabled) == (
        dtype == "fp16",
        dtype == "bf16",
    )
    assert (parsed.gradient_clipping, parsed.steps_per_print, parsed.optimizer_name) == (1.0, None, None)
    offload = {name: getattr(parsed.zero_config, name) for name in ("offload_param", "offload_optimizer")}
    expected = {
        "zero2_offload": (None, "cpu"),
        "zero3_offload": ("cpu", "cpu"),
        "zero3_nvme": ("nvme", "nvme"),
    }
    assert tuple(block and block.device for block in offload.values()) == expected.get(
        path.stem, (None, None)
    )
