"""`fedspeed plan` and `fedspeed probe` as a user calls them."""

import json
import subprocess
import sys

import pytest

from fedspeed.config.deepspeed import merge
from fedspeed.config.load import load
from tests.conftest import ROOT
from tests.limits import LIMIT_S
from tests.planner.cases import HUB

HEAVY = "{'torch', 'transformers', 'deepspeed', 'numpy', 'peft'}"


def run_fedspeed(*arguments, code="import sys; from fedspeed.cli import main; sys.exit(main(sys.argv[1:]))"):
    """Run Python code, by default the command line of FedSpeed, with these arguments in a new process."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "--hostfile", "hostfiles/hetero10", "--model", f"{HUB}Qwen-14B"],
        ["plan", "--help"],
        ["--help"],
    ],
)
def test_nothing_heavy_is_imported(arguments):
    code = (
        "import sys\nfrom fedspeed.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as "
        "end:\n    assert not end.code\n"
        f"print('heavy:', sorted({HEAVY} & set(sys.modules)))"
    )
    done = run_fedspeed(*arguments, code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("heavy: []\n") and len(done.stdout) > 500


def test_the_text_says_what_to_paste_and_why():
    done = run_fedspeed("plan", "--hostfile", "hostfiles/hetero10", "--model", f"{HUB}Qwen-14B")
    assert done.returncode == 0, done.stderr
    for text in (
        "of 10.2",
        "rtx2080ti",
        "engine.tier=ram",
        "model.dtype=fp16",
        "blocks 0-47",
        "does not fit: 34",
        "exchange, once a round",
        "node10",
        "64 GiB RAM assumed",
    ):
        assert text in done.stdout


def test_json_adds_up():
    done = run_fedspeed(
        "plan",
        "--hostfile",
        "hostfiles/scale16",
        "--model",
        f"{HUB}Qwen-7B",
        "--clients",
        16,
        "--tokens",
        256,
        "--rows",
        6,
        "--micro-batch",
        2,
        "--json",
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (
        plan["task"]["tokens"] == 256
        and plan["task"]["rows"] == 6
        and plan["task"]["parameters"] == 7_615_616_512
    )
    assert (plan["setting"]["micro_batch"], plan["setting"]["accumulation"]) == (2, 3)
    assert len(plan["clients"]) == 16 and [cluster["name"] for cluster in plan["clusters"]] == [
        "rtx3090",
        "rtx2080ti",
    ]
    for cluster in plan["clusters"]:
        assert (
            sum(cluster["memory"]["gpu"].values())
            == cluster["memory"]["gpu_bytes"]
            <= cluster["usable"]["gpu_bytes"]
        )
        assert sum(cluster["seconds"]["causes"].values()) == pytest.approx(cluster["seconds"]["total"])


@pytest.mark.parametrize(
    "arguments",
    [[], ["data.clients=10"], ["adapter.targets=all-linear", "train.micro_batch=2", "train.accumulation=2"]],
)
def test_what_it_says_to_paste_is_a_valid_run(arguments):
    """The settings of the plan are added to the configuration that the plan was made for. That configuration
    leaves the type open: three clients get 3090s, and ten need a 2080 Ti.
    """
    done = run_fedspeed(
        "plan", "--hostfile", "hostfiles/hetero10", "--config", "ds_configs/gsm8k.yaml", *arguments, "--json"
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["task"]["shape"]["name"] == f"{HUB}Qwen-1.5B" and plan["task"]["rows"] == 4
    assert plan["task"]["dtype"] == ("fp16" if "data.clients=10" in arguments else "bf16")
    loaded = load(ROOT / "ds_configs" / "gsm8k.yaml", [*arguments, *plan["overrides"]])
    merged = merge(loaded.config.deepspeed, loaded.config, loaded.folder)
    assert loaded.config.engine.tier == plan["setting"]["tier"]
    assert merged["zero_optimization"]["stage"] == (0 if plan["setting"]["tier"] == "stock" else 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hostfile", "hostfiles/hetero10", "--model", "gpt5"], "model 'gpt5' is neither a folder"),
        (
            ["--hostfile", "hostfiles/local", "--model", "gpt3-125m"],
            "host localhost: neither its card nor a measurement",
        ),
        (["--hostfile", "hostfiles/none", "--model", "gpt3-125m"], "there is no such hostfile"),
        (["--hostfile", "hostfiles/hetero10"], "model.base is empty"),
        (
            ["--hostfile", "hostfiles/hetero10", "--model", f"{HUB}Qwen-14B", "--dtype", "bf16"],
            "set model.dtype=fp16",
        ),
        (
            ["--hostfile", "hostfiles/hetero10", "--model", "gpt3-125m", "--rows", "0"],
            "--rows=0: must be at least 1",
        ),
        (
            ["--hostfile", "hostfiles/hetero10", "--model", "gpt3-125m", "--probe", "README.md"],
            "README.md: cannot be read as a probe",
        ),
        (
            [
                "--hostfile",
                "hostfiles/hetero10",
                "--model",
                f"{HUB}Qwen-14B",
                "--tokens",
                "800000",
                "--rows",
                "1",
            ],
            "  - data.max_tokens=",
        ),
        (
            ["--hostfile", "hostfiles/hetero10", "--model", "gpt3-13b", "--tokens", "4096"],
            "set data.max_tokens=2048",
        ),
        (
            ["--hostfile", "hostfiles/hetero10", "--model", "gpt3-125m", "--rows", "4", "--micro-batch", "3"],
            "choose --micro-batch=2",
        ),
        (
            ["--hostfile", "hostfiles/hetero10", "--model", "gpt3-125m", "--rows", "99999"],
            "the planner takes at most 4096",
        ),
        (
            ["--hostfile", "hostfiles/hetero10", "--model", f"{HUB}Qwen-14B", "adapter.method=blocks"],
            "the planner knows lora and full only",
        ),
    ],
)
def test_what_it_refuses(arguments, message):
    done = run_fedspeed("plan", *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_probe_of_this_machine_is_what_plan_reads(tmp_path):
    done = run_fedspeed("probe", "--out", tmp_path / "here.json", "--disk", tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "here.json").read_text())
    assert 1e-5 < facts["device"]["launch_forward_s"] <= facts["device"]["launch_backward_s"] < 1
    assert not facts["device"].keys() & {"down_bytes_s", "both_bytes_s"}  # of a bus that a CPU does not have
    assert facts["device"]["kind"] == "cpu" and 1e8 < facts["device"]["flops"]["fp32"] < 1e14
    assert all(
        1e6 < facts[part][rate] < 1e12
        for part, rate in (("ram", "bytes_s"), ("disk", "bytes_s"), ("link", "loopback_bytes_s"))
    )
    assert not list(tmp_path.glob(".probe-*"))  # its file on the disk is gone
    (tmp_path / "config.json").write_text(
        json.dumps({
            "model_type": "llama",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "vocab_size": 260,
        })
    )
    arguments = (
        "plan",
        "--hostfile",
        "hostfiles/local",
        "--model",
        tmp_path,
        "--probe",
        tmp_path / "here.json",
    )
    done = run_fedspeed(*arguments)
    assert done.returncode == 0, done.stderr
    assert "115.52 k parameters, " in done.stdout
    done = run_fedspeed(*arguments, "--json")
    plan = json.loads(done.stdout)
    assert (
        plan["clusters"][0]["memory"]["gpu"] == {}
        and plan["clusters"][0]["memory"]["ram_bytes"] <= facts["ram"]["free_bytes"]
    )
    assert plan["setting"]["block_inputs"] == "device"


def test_the_line_to_paste_takes_back_what_was_not_planned_and_keeps_what_was_counted_on():
    done = run_fedspeed(
        "plan",
        "--hostfile",
        "hostfiles/hetero10",
        "--config",
        "ds_configs/gsm8k.yaml",
        "--json",
        "engine.pipeline=client",
        "data.clients=10",
        "engine.matmul=fp16_accumulation",
    )
    assert done.returncode == 0, done.stderr
    assert {"engine.pipeline=none", "engine.matmul=fp16_accumulation"} <= set(
        json.loads(done.stdout)["overrides"]
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["hostfiles/hetero10", "engine.matmul=tf32"],
            "engine.matmul=tf32 changes products of fp32 numbers, but this run computes in",
        ),
        (
            ["hostfiles/hetero10", "engine.matmul=tf32", "model.dtype=fp32"],
            "engine.matmul=tf32: no rate of tf32 is known of rtx2080ti",
        ),
    ],
)
def test_arithmetic_that_a_run_would_refuse_is_not_planned(arguments, said):
    done = run_fedspeed(
        "plan", "--config", "ds_configs/gsm8k.yaml", "data.clients=10", "--hostfile", *arguments
    )
    assert done.returncode == 2
    assert said in done.stderr
