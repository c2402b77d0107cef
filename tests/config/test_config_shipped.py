"""The files users read first: each YAML loads, merges, and works with each JSON; and reading them is
cheap.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from fedspeed.config.deepspeed import merge, zero_stage
from fedspeed.config.load import load
from fedspeed.engine.ds_config import ModelFacts, resolve_autos
from fedspeed.errors import ConfigError
from tests.limits import LIMIT_S

ROOT = Path(__file__).resolve().parents[2]
YAMLS = sorted((ROOT / "ds_configs").glob("*.yaml"))
JSONS = sorted((ROOT / "ds_configs").glob("*.json"))
STAGES = {path: int(path.stem[4]) if path.stem.startswith("zero") else 0 for path in JSONS}  # ZeRO's


def test_what_is_shipped():
    assert {"quickstart", "gsm8k", "pipeline"} <= {path.stem for path in YAMLS}
    assert {
        "zero0",
        "zero1",
        "zero2",
        "zero3",
        "zero2_offload",
        "zero3_offload",
        "zero3_nvme",
        "pipeline",
    } == {path.stem for path in JSONS}


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_each_yaml_names_a_shipped_json(path):
    loaded = load(path)
    merged = merge(loaded.config.deepspeed, loaded.config, loaded.folder)
    assert ROOT / "ds_configs" / loaded.config.deepspeed["base"] in JSONS
    assert merged["train_micro_batch_size_per_gpu"] == loaded.config.train.micro_batch


@pytest.mark.parametrize("base", JSONS, ids=lambda path: path.stem)
@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_each_yaml_works_with_each_json(path, base):
    pipeline = "client" if base.stem == "pipeline" else "none"
    full = ["adapter.method=lora"] if pipeline != "none" else []
    loaded = load(path, [f"deepspeed.base={base.name}", f"engine.pipeline={pipeline}", *full])
    assert zero_stage(merge(loaded.config.deepspeed, loaded.config, loaded.folder)) == STAGES[base]


@pytest.mark.parametrize("executed", ["engine.tier=stock", "adapter.method=full"])
def test_recomputing_with_parameters_on_nvme_is_refused_where_deepspeed_would_do_it(executed):
    loaded = load(ROOT / "ds_configs" / "gsm8k.yaml", ["deepspeed.base=zero3_nvme.json", executed])
    with pytest.raises(ConfigError, match="nvme: .*engine.activation_checkpointing=false"):
        merge(loaded.config.deepspeed, loaded.config, loaded.folder)


@pytest.mark.parametrize("base", JSONS, ids=lambda path: path.stem)
def test_the_engine_answers_every_auto_of_a_shipped_file(base):
    loaded = load(
        ROOT / "ds_configs" / "quickstart.yaml",
        [f"deepspeed.base={base.name}", *(["engine.pipeline=client"] if base.stem == "pipeline" else [])],
    )
    facts = ModelFacts(hidden=64, block=1000, trainable=500, largest=4000)
    resolve_autos(
        merge(loaded.config.deepspeed, loaded.config, loaded.folder),
        facts,
        Path("swap"),
        shared_base=STAGES[base] == 3,
    )


def test_the_mission_run_is_what_was_promised():
    config = load(ROOT / "ds_configs" / "gsm8k.yaml").config
    assert config.model.base == "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    assert (config.data.task, config.data.clients, config.data.split) == ("gsm8k", 3, "iid")


@pytest.mark.parametrize("suffix", ["", "_smol"])
@pytest.mark.parametrize(
    "task, clients, split, max_tokens",
    [("codealpaca", 9, "meta", 650), ("dolly", 8, "meta", 650), ("gsm8k", 3, "iid", 1000)],
)
def test_the_tasks_are_split_prompted_and_truncated_as_published(task, clients, split, max_tokens, suffix):
    config = load(ROOT / "ds_configs" / f"{task}{suffix}.yaml").config
    data = config.data
    assert (data.task, data.clients, data.split, data.max_tokens) == (task, clients, split, max_tokens)
    assert data.template == "alpaca" and config.adapter.lora_rank == 8
    assert suffix or config.train.local_steps == 30


@pytest.mark.parametrize(
    "line",
    [
        "load(path)",
        "loaded = load(path); show.render(loaded, merge(loaded.config.deepspeed, loaded.config, "
        "loaded.folder))",
    ],
)
def test_reading_a_configuration_imports_no_torch(line):
    code = (
        "import sys; from pathlib import Path; from fedspeed.config import check, convert, deepspeed, "
        "names, run, show, tree\n"
        "from fedspeed.config.load import load; from fedspeed.config.deepspeed import merge\n"
        f"path = Path('ds_configs/gsm8k.yaml'); {line}\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'peft', 'mpi4py', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_shipped_base_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = load(ROOT / "ds_configs" / "gsm8k_small.yaml").config.model.base
    assert (
        base == str(ROOT / "ds_configs" / "models" / "small-llama" / "config.json") and Path(base).is_file()
    )
