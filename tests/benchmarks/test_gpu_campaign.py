"""The GPU campaign (benchmarks/gpu): all phases on the CPU, and how they are run and recorded."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch  # noqa: F401 - before the phases are forked, which would import it within their limits

from benchmarks.gpu import __main__ as campaign
from benchmarks.gpu import roundpipe, smoke
from benchmarks.gpu.engines import Recipe, Scene
from benchmarks.gpu.phases import EVERY, LISTS, Phase, chosen
from benchmarks.gpu.record import LeftOut, Record, has_failed
from benchmarks.gpu.report import summary
from benchmarks.gpu.runner import run_phase
from benchmarks.gpu.shapes import DRY_BLOCKS, model_of, step_of, write_model
from fedspeed.engine.config import EngineConfig
from tests.conftest import ROOT
from tests.engine.engines import OPTIONAL
from tests.limits import LIMIT_S


@pytest.mark.slow
def test_every_phase_runs_on_a_cpu(tmp_path):
    """One command runs all phases with tiny shapes. Those that need a GPU say so; the others give numbers."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(OPTIONAL)]), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(tmp_path)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in EVERY}
    assert not {name: one["results"] for name, one in found.items() if has_failed(one["results"])}
    assert {one["status"] for one in found.values()} == {"finished"} and ended.returncode == 0, ended.stderr
    results = {name: one["results"] for name, one in found.items()}
    for name in ("perf-7b-11gib", "perf-14b-24gib", "perf-14b-11gib"):
        planned = results[name]["32k planned"]
        alone = results[name]["32k arithmetic"]
        assert planned["losses"] == pytest.approx(alone["losses"], rel=1e-6) and alone["loads"] == 0
        assert {"tokens/s", "of arithmetic", "predicted GiB", "predicted s", "waited s"} <= planned.keys()
        assert results[name]["8k two slots, inputs in RAM, all recomputed"]["loads"] == 2 * (DRY_BLOCKS - 2)
    stock = results["stock-7b-11gib"]
    assert stock["comparison"]["losses off"] < 1e-3
    *warm_up, counted = stock["stock: seconds of its steps, 2 to warm up"]
    assert len(warm_up) == 2 and round(stock["stock ZeRO-3 offload"]["s a step"], 3) == pytest.approx(
        counted, abs=1e-3
    )
    assert results["roundpipe-14b-24gib"]["RoundPipe"].keys() == {"left out"}
    assert (
        results["roundpipe-14b-24gib"]["sequence"]["loss"]
        == results["roundpipe-14b-24gib"]["sequence"]["of the model"]
    )
    assert all(
        "off" in results["smoke"][one.name] or "left out" in results["smoke"][one.name] for one in smoke.FEW
    )
    assert (
        results["fp16-accumulation"]["fp16 accumulation"]["losses off"]
        == results["compiled-blocks"]["compiled"]["losses off"]
        == 0
    )
    assert results["masked"]["masked"]["round"] == results["quickstart"]["quickstart"]["round"] == 1
    page = (tmp_path / "summary.md").read_text()
    assert (
        page in ended.stdout
        and "card none" in page
        and all(f"| {name} | finished |" in page for name in EVERY)
    )


def test_a_phase_is_killed_at_its_limit_and_what_it_wrote_stays(tmp_path):
    """All processes that it started end with it."""
    for limit_s in (2.0, 20.0, 200.0):  # on a busy machine it may be killed before it has written anything
        run_phase(Phase("one", f"{__name__}.never_ends", 1.0), tmp_path, True, limit_s)
        found = json.loads((tmp_path / "one.json").read_text())
        if "child" in found["results"]:
            break
    assert found["status"] == f"ended at its limit of {limit_s:.0f} s" and found["results"]["first"] == 1
    stat = Path(f"/proc/{found['results']['child']}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


@pytest.mark.parametrize(
    "function, status",
    [
        ("dies", "failed: its process ended with 7"),
        ("vanishes", "failed: its process ended without a result"),
    ],
)
def test_a_phase_that_dies_has_failed(tmp_path, function, status):
    """A phase without results failed even with exit code 0: its last results may be lost."""
    run_phase(Phase("one", f"{__name__}.{function}", 1.0), tmp_path, True, LIMIT_S)
    assert json.loads((tmp_path / "one.json").read_text())["status"] == status


def never_ends(scene):
    scene.record.note("first", 1)
    scene.record.note("child", subprocess.Popen(["sleep", "600"]).pid)
    time.sleep(600)


def dies(scene):
    os._exit(7)


def vanishes(scene):
    os._exit(0)


def test_a_failure_is_a_result_and_the_rest_goes_on(tmp_path):
    record = Record(tmp_path, "one", limit_s=100.0)
    with record.guarded("a"):
        raise ValueError("of this kind")
    with record.guarded("b"):
        record.need(99.0)
        record.note("b", {"tokens/s": 3})
    with record.guarded("c"):
        record.need(101.0)
    record.finish()
    found = json.loads((tmp_path / "one.json").read_text())
    assert found["results"]["a"]["failed"] == "ValueError: of this kind" and found["results"]["b"] == {
        "tokens/s": 3
    }
    assert found["results"]["c"].keys() == {"left out"} and found["status"] == "failed"
    with pytest.raises(LeftOut):
        record.need(101.0)


def test_losses_that_differ_fail_the_smoke_phase():
    recipe = Recipe(EngineConfig(tier="ram"), "fp32")
    assert "failed" not in smoke.verdict(recipe, [2.0, 1.0], [2.0001, 1.0])
    assert "failed" in smoke.verdict(recipe, [2.0, 1.0], [2.001, 1.0])
    assert "failed" in smoke.verdict(recipe, [float("nan"), 1.0], [2.0, 1.0])


def test_after_a_failed_smoke_nothing_is_run(tmp_path, monkeypatch):
    ran = []

    def fails(phase, out, dry, limit_s):
        ran.append(phase.name)
        (out / f"{phase.name}.json").write_text(
            json.dumps({"phase": phase.name, "status": "failed", "seconds": 1, "about": {}, "results": {}})
        )

    monkeypatch.setattr(campaign, "run_phase", fails)
    monkeypatch.setattr(campaign, "check_card", lambda parser: None)
    monkeypatch.setattr(sys, "argv", ["campaign", "--out", str(tmp_path)])
    assert campaign.main() == 1
    assert ran == ["link", "smoke"]
    assert "smoke failed" in json.loads((tmp_path / "stock-7b-11gib.json").read_text())["status"]


@pytest.mark.parametrize(
    "name, value, told",
    [("DS_ACCELERATOR", "cpu", "DS_ACCELERATOR=cpu"), ("CUDA_VISIBLE_DEVICES", "", "no GPU is visible")],
)
def test_without_a_card_it_does_not_begin(monkeypatch, capsys, name, value, told):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["campaign", "link"])
    with pytest.raises(SystemExit):
        campaign.main()
    assert told in capsys.readouterr().err


def test_the_lists_keep_to_fifteen_minutes():
    """The sum includes two minutes for the start of the machine."""
    assert all(2 + sum(phase.minutes for phase in phases) <= 15 for phases in LISTS.values())
    assert chosen([], "", dry=False) == list(LISTS["first"]) and chosen(["link"], "second", dry=False) == [
        EVERY["link"]
    ]
    with pytest.raises(ValueError, match="no phase is called nothing; there are link, smoke"):
        chosen(["nothing"], "", dry=True)


def test_the_page_shows_steps_as_a_table_and_the_rest_as_lines():
    phases = [
        {
            "phase": "perf",
            "status": "finished",
            "seconds": 3.0,
            "about": {"card": "H100", "torch": "2.11", "date": "today"},
            "results": {
                "8k planned": {"s a step": 0.5, "tokens/s": 16000, "of arithmetic": 0.96},
                "8k x": {"left out": "no time"},
            },
        }
    ]
    page = summary(phases)
    assert "card H100, torch 2.11, date today" in page and "| perf | finished | 3.0 |" in page
    assert "| perf | 8k planned | 0.5 | 16000 | 0.96 |" in page and "- 8k x: left out no time" in page


class FakePipe:
    """A fake RoundPipe for the CPU, without staleness, with the interface that the campaign uses."""

    def __init__(self, model, optim_dtype, name):
        self._model = model

    def optim_parameters(self):
        return [p for p in self._model.parameters() if p.requires_grad]

    def forward_backward(self, input_args, label, loss_fn, run_config):
        parts, _ = run_config.split_input(input_args, {}, run_config.num_microbatch)
        total = 0.0
        for args, labels in zip(parts, label.chunk(run_config.num_microbatch)):
            state = self._model[0](*args)
            for layer in self._model[1:]:
                state = layer(state)
            loss = loss_fn(state, labels)
            loss.backward()
            total += loss.detach()
        return total

    def step(self, update):
        update()


def test_roundpipe_trains_the_task_that_ours_trains(tmp_path, monkeypatch):
    """Compare sequence, rows and losses with a fake package."""
    plan = SimpleNamespace(auto=lambda kind, pipe, model_memory_limit: (kind, model_memory_limit))
    fake = SimpleNamespace(RoundPipe=FakePipe, ModelExecutePlan=plan, RoundPipeRunConfig=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "roundpipe", fake)
    phase = EVERY["roundpipe-14b-24gib"]
    shape = model_of("14B", dry=True)
    scene = Scene(phase, Record(tmp_path, phase.name, limit_s=LIMIT_S), tmp_path, tmp_path, dry=True)
    net = roundpipe.load(write_model(tmp_path / "model", shape))
    expected = roundpipe.check_sequence(
        tmp_path / "model", step_of(roundpipe.STEPS[0], dry=True), shape.vocab
    )
    ours = {"results": {"8k planned": {"tokens/s": 1, "losses": [expected["loss"]]}}}
    (tmp_path / f"{roundpipe.OURS}.json").write_text(json.dumps(ours))
    roundpipe.measure_all(scene, net, shape.vocab)
    assert not has_failed(scene.record.results)
    losses = scene.record.results["8k"]["losses"]
    assert losses[0] == pytest.approx(expected["of the model"], rel=1e-5) and losses[-1] < losses[0]
    assert scene.record.results["8k beside ours"]["first loss off"] < 1e-5
    assert scene.record.results["32k beside ours"].keys() == {"left out"}
