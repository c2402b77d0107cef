"""`fedspeed bench`: how runs are made comparable, what is computed from them, and a small comparison."""

import json
import subprocess
import sys

import pytest

from benchmarks.compare.command_line import main
from benchmarks.compare.measured.arms import ARMS, DEFAULT, arguments_of, chosen, merged
from benchmarks.compare.measured.prepare import _kept, more_settings
from benchmarks.compare.measured.records import Bench, Point, Run, Setting, read
from benchmarks.compare.measured.report import page, write
from benchmarks.compare.measured.runs import finished, needed
from benchmarks.compare.measured.statistics import (
    differences,
    final_loss,
    first_at,
    loss_by,
    ratio,
    target_of,
)
from benchmarks.compare.processes import Watched, watch
from fedspeed.config.load import load
from fedspeed.errors import ConfigError, DataError
from tests.conftest import ROOT
from tests.limits import LIMIT_S
from tests.tiny import write_llama

QUICKSTART = ROOT / "ds_configs" / "quickstart.yaml"
GIB = 2**30


def a_run(arm="fedspeed", seed=0, losses=(4.0, 2.0, 1.0), round_s=2.0, device=GIB, **more):
    """Return a finished run of ten tokens a round."""
    curve = [
        Point(round=n, seconds=n * round_s, tokens=10 * n, loss=loss, exact=0.5)
        for n, loss in enumerate(losses)
    ]
    causes = dict.fromkeys(("compute", "gather", "exchange", "idle", "other"), round_s / 5)
    values = {
        "arguments": ("a=1",),
        "status": "finished",
        "curve": tuple(curve),
        "first_aggregate_s": 9.0,
        "round_s": round_s,
        "causes": causes,
        "device_bytes": device,
        "host_rss": 3 * GIB,
        "sent": 100.0,
    }
    return Run(arm=arm, seed=seed, **{**values, **more})


def a_bench(runs, **more):
    setting = {
        "config": "c.yaml",
        "model": "tiny",
        "parameters": 319_000,
        "clients": 4,
        "overrides": (),
        "arms": {name: ARMS[name].title for name in dict.fromkeys(run.arm for run in runs)},
        "cap_gib": None,
        "target": None,
    }
    machine = {"cores": 2, "processor": "a processor", "torch": "2"}
    return Bench(date="2026-01-01", machine=machine, setting=Setting(**{**setting, **more}), runs=tuple(runs))


def test_every_arm_trains_the_same_adapter_on_the_same_rows():
    """Whatever the presets of methods say."""
    overrides = ("federation.rounds=3", "federation.public_rows=rows.jsonl")
    configs = {
        arm.name: load(QUICKSTART, arguments_of(arm, QUICKSTART, overrides, 7)).config
        for arm in chosen([*DEFAULT, "spry_iteration", "fs_llm_offload", "fedprox"], {})
    }
    ours = configs["fedspeed"]
    assert (ours.adapter.lora_rank, ours.train.micro_batch, ours.run.seed) == (8, 16, 7)
    for name, config in configs.items():
        assert config.adapter == ours.adapter, name
        assert config.data == ours.data, name
        for key in ("local_steps", "micro_batch", "accumulation", "clip", "schedule", "warmup_steps"):
            assert getattr(config.train, key) == getattr(ours.train, key), (name, key)
        assert config.federation.rounds == 3, name
        assert config.federation.round_budget == "steps", name
    for name in ("fs_llm", "fate_llm", "fedavg_lora", "zero3_offload", "m2fedsa", "fedspeed_ram"):
        assert configs[name].train == ours.train, name
        assert configs[name].federation.server_optimizer == ours.federation.server_optimizer, name
    assert configs["spry"].federation.server_optimizer == "yogi"
    assert configs["spry"].train.lr == 1e-4


def test_names_and_settings_are_checked():
    (own, tuned) = chosen(["mine", "fs_llm"], {"mine": ["engine.tier=nvme"], "fs_llm": ["train.lr=1"]})
    assert own.settings[-1] == "engine.tier=nvme"
    assert tuned.settings == ("federation.method.name=fs_llm", "train.lr=1")
    assert merged(("a=1", "b=2"), ("a=3",)) == ("a=3", "b=2")
    with pytest.raises(ConfigError, match="nonsense is unknown.*fedspeed"):
        chosen(["nonsense"], {})
    with pytest.raises(ConfigError, match="given twice"):
        chosen(["spry", "spry"], {})
    with pytest.raises(ConfigError, match="--set spry: is not among --methods fs_llm"):
        chosen(["fs_llm"], {"spry": ["a=1"]})
    with pytest.raises(ConfigError, match="write NAME:key=value"):
        more_settings(["train.lr=1"])
    assert more_settings(["a:b=1", "a:c=d:e"]) == {"a": ["b=1", "c=d:e"]}


def test_a_quick_comparison_of_another_file_is_refused(capsys):
    assert main(["--quick", "--config", "mine.yaml"]) == 2
    assert "--config=mine.yaml: --quick is of ds_configs/quickstart.yaml" in capsys.readouterr().out


def test_what_was_measured_of_another_configuration_is_measured_again(tmp_path):
    runs = [a_run(), a_run("spry"), a_run("fs_llm", status="failed")]
    plan = [(ARMS[name], 0, ("a=1",)) for name in ("fedspeed", "fs_llm")]
    plan += [(ARMS["spry"], 0, ("a=2",))]
    write(a_bench(runs, digest="that of a file"), tmp_path)
    path = tmp_path / "bench.json"
    assert _kept(path, plan, "that of a file") == (runs[0],)
    assert _kept(path, plan, "that of another") == ()
    assert _kept(tmp_path / "none.json", plan, "that of a file") == ()


def test_a_failed_run_tells_what_a_dry_run_needs():
    """The line of a dry run about memory; nothing where that is refused too."""
    says = [sys.executable, "-c", "print('hosts    1\\nmemory   about 19.0 GiB on a device: base 17 GiB')"]
    assert needed(says) == ". A step needs about 19.0 GiB on a device: base 17 GiB"
    assert needed([sys.executable, "-c", "raise SystemExit(2)"]) == ""


def test_a_ratio_has_students_interval_of_logarithms():
    """Of the ratios 2, 4 and 8: logarithms base 2 are 1, 2, 3, their standard error 1 / sqrt(3)."""
    found = ratio({0: 2.0, 1: 4.0, 2: 8.0, 5: 1.0}, {0: 1.0, 1: 1.0, 2: 1.0})
    half = 4.302652729749464 / 3**0.5
    assert found.mean == pytest.approx(4.0)
    assert found.low == pytest.approx(2 ** (2 - half))
    assert found.high == pytest.approx(2 ** (2 + half))
    assert ratio({0: 3.0}, {0: 2.0}) == (pytest.approx(1.5), None, None)
    assert ratio({0: 3.0}, {1: 2.0}) is None
    assert ratio({0: 3.0}, {0: 0.0}) is None


def test_losses_at_tokens_at_time_and_at_a_target():
    run = a_run(losses=(4.0, None, 2.0, 1.0))
    assert final_loss(run) == 1.0
    assert final_loss(run.model_copy(update={"exported_loss": 1.5})) == 1.5
    assert [loss_by(run.curve, seconds) for seconds in (-1.0, 0.0, 3.9, 4.0, 99.0)] == [
        None,
        4.0,
        4.0,
        2.0,
        1.0,
    ]
    assert first_at(run.curve, 2.0).round == 2
    assert first_at(run.curve, 0.5) is None
    assert target_of(run) == pytest.approx(2.1)
    assert differences(run, a_run(losses=(4.5, 3.0, 2.5, 1.0))) == [0.5, 0.0]
    assert differences(run, a_run(losses=())) == []


def test_what_a_run_prints_becomes_its_curve():
    """The start is not in the seconds of rounds; the first round is not among the steady ones."""
    record = {
        "event": "round",
        "val_exact": None,
        "step_s": 0.5,
        "per_client": [{"device_bytes": 7}, {"device_bytes": 10}],
        "clients": 2,
        "bytes_sent": 40,
        **dict.fromkeys(("compute_s", "gather_s", "exchange_s", "idle_s"), 0.25),
    }
    rounds = [(0, 1.0, "NaN", 0), (1, 5.0, None, 7), (2, 2.0, 1.5, 8), (3, 4.0, 1.25, 9)]
    lines = [
        (10.0 + n, json.dumps({**record, "round": n, "seconds": s, "val_loss": loss, "tokens": tokens}))
        for n, s, loss, tokens in rounds
    ]
    watched = Watched(0, 30.0, ((1.0, "DeepSpeed says"), *lines), rss=5, pss=4, errors="")
    run = finished(a_run(curve=()), watched)
    assert [(p.seconds, p.tokens) for p in run.curve] == [(0.0, 0), (5.0, 7), (7.0, 15), (11.0, 24)]
    assert run.curve[0].loss != run.curve[0].loss
    assert (run.start_s, run.first_aggregate_s, run.round_s) == (10.0, 11.0, 3.0)
    assert run.causes["other"] == 2.0
    assert (run.sent, run.device_bytes, run.host_rss, run.host_pss) == (20.0, 10, 5, 4)


def test_the_page_says_what_is_equal_what_failed_and_what_does_not_fit(tmp_path):
    runs = [a_run(seed=seed, round_s=2.0 + seed) for seed in range(3)]
    runs += [a_run("fs_llm", seed, round_s=6.0 + 3 * seed, device=8 * GIB) for seed in range(3)]
    runs += [a_run("spry", 0, losses=(4.0, 3.9, 3.8))]
    runs += [Run(arm="fedbiot", seed=0, arguments=(), status="failed", reason="exit code 2: no rows")]
    bench = a_bench(runs, cap_gib=6.0)
    text = page(bench)
    row = next(line for line in text.splitlines() if line.startswith("| FederatedScope-LLM"))
    assert "8.00 GiB (8x, 8 to 8)" in row and "9 s (3x, 3 to 3)" in row
    assert "| 0.0e+00, equal |" in text
    assert "| 1.9e+00; later up to 2.8e+00 |" in text and "not reached" in text
    assert "- fedbiot, seed 0: failed, exit code 2: no rows" in text
    assert "- FederatedScope-LLM does not fit in 6 GiB: it needs 8.00 GiB." in text
    assert "- The target of the held-out loss is 2.1000." in text
    write(bench, tmp_path)
    again = read(tmp_path / "bench.json")
    assert (again.setting, again.runs) == (bench.setting, bench.runs)
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"
    values = json.loads((tmp_path / "bench.json").read_text())
    values["runs"][0]["device_bytes"] = "much"
    (tmp_path / "bench.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="bench.json: is no result.*runs.0.device_bytes"):
        read(tmp_path / "bench.json")


def test_a_command_is_watched_with_all_its_processes(tmp_path):
    """Its child holds memory too, and both are gone when its limit is reached."""
    code = (
        "import subprocess, sys, time; print('on', flush=True); x = bytearray(30 << 20); "
        "subprocess.Popen([sys.executable, '-c', 'x = bytearray(60 << 20); import time; time.sleep(99)']); "
        "time.sleep(99)"
    )
    seen = watch([sys.executable, "-c", code], cwd=tmp_path, env={}, limit_s=3.0)
    assert seen.code is None
    assert seen.lines[0][1] == "on"
    assert seen.rss > 90 << 20
    assert seen.pss > 90 << 20
    ended = watch([sys.executable, "-c", "raise SystemExit('why')"], cwd=tmp_path, env={})
    assert (ended.code, ended.errors) == (1, "why\n")


def test_a_quick_comparison_runs_and_goes_on(tmp_path):
    """Two methods with the same mathematics have the same losses, and are not run again."""
    base = write_llama(tmp_path / "base")
    command = [
        *(sys.executable, "-m", "fedspeed", "bench", "--quick", "--methods", "fedspeed,fs_llm"),
        *("--seeds", "0", "--ranks", "1", "--out", str(tmp_path / "bench"), f"model.base={base}"),
        *("federation.rounds=2", "train.local_steps=2", "data.max_val_rows=4"),
    ]
    for runs in (2, 0):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("a round, held-out loss") == runs
    bench = read(tmp_path / "bench" / "bench.json")
    ours, theirs = bench.runs
    assert [run.status for run in bench.runs] == ["finished"] * 2
    assert len(ours.curve) == 3 and ours.device_bytes and ours.sent == 0
    assert max(differences(ours, theirs)) <= 1e-5
    assert "equal |" in (tmp_path / "bench" / "bench.md").read_text()
