"""A run from its command line to its output files, which agree with each other."""

import json
import logging
import re
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.run.launched import LLAMA, SETTINGS, headline, journal_rounds, last_round, records

ROUNDS = SETTINGS["federation"]["rounds"]


def test_stdout_has_only_json_lines_and_they_are_the_rounds(whole):
    ended, run = whole
    events = [json.loads(line) for line in ended.out.splitlines()]
    assert [event.pop("event") for event in events] == ["round"] * (ROUNDS + 1) + ["summary"]
    assert events[:-1] == records(run)
    assert [record["round"] for record in records(run)] == list(range(ROUNDS + 1))
    summary = events[-1]
    assert (
        summary["status"],
        summary["exit_code"],
        summary["rounds"],
        summary["restarts"],
        summary["missing"],
    ) == ("finished", 0, ROUNDS, 0, [])
    assert summary["last_val_loss"] == records(run)[-1]["val_loss"]
    assert summary["tokens"] == sum(record["tokens"] for record in records(run)) > 0


def test_it_learns_from_every_client(whole):
    rounds = records(whole[1])
    assert rounds[-1]["val_loss"] < 0.97 * rounds[0]["val_loss"]
    assert (
        all(0 <= record["val_exact"] <= 1 for record in rounds)
        and rounds[1]["per_client"][0]["val_exact"] is not None
    )
    for record in rounds[1:]:
        assert [client["client"] for client in record["per_client"]] == [0, 1, 2]
        assert all(
            client["local_steps"] == SETTINGS["train"]["local_steps"] and client["tokens"] > 0
            for client in record["per_client"]
        )
        assert (record["clients"], record["received"]) == (3, 3)


def test_the_report_says_what_the_log_says(whole):
    ended, run = whole
    text = (run / "report.md").read_text()
    assert headline(run) == "# Run `whole`: finished"
    rows = {
        int(number): line
        for line in text.splitlines()
        if (number := (re.match(r"\| (\d+) \|", line) or [0, ""])[1]) and "of 3" in line
    }
    assert sorted(rows) == list(range(1, ROUNDS + 1))
    for record in records(run)[1:]:
        assert f"| {record['train_loss']:.4f} | {record['val_loss']:.4f} " in rows[record["round"]]
    best = min(records(run), key=lambda record: record["val_loss"])
    assert f"| held-out loss, best | {best['val_loss']:.4f} (round {best['round']}) |" in text
    assert f"| held-out loss, first | {records(run)[0]['val_loss']:.4f} |" in text
    assert "| missing updates | 0 |" in text and "| restarts | 0 |" in text
    assert str(run / "report.md") in ended.err


def test_the_report_holds_the_prediction_beside_the_measurement(whole):
    row = next(
        line
        for line in (whole[1] / "report.md").read_text().splitlines()
        if "device memory of the fullest rank" in line
    )
    predicted, measured = (
        re.fullmatch(r"([\d.]+) (KiB|MiB)", cell.strip()).groups() for cell in row.split("|")[2:4]
    )
    assert predicted[1] == measured[1]
    recorded = max(record["device_bytes"] for record in records(whole[1]) if record["device_bytes"])
    assert float(measured[0]) == pytest.approx(recorded / {"KiB": 2**10, "MiB": 2**20}[measured[1]], rel=0.01)
    assert float(predicted[0]) == pytest.approx(float(measured[0]), rel=0.5), (
        "a model this small is mostly what the planner rounds away"
    )


def test_the_plot_is_an_image(whole):
    content = (whole[1] / "report.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width > 400 and height > 200


def test_tensorboard_has_the_same_losses(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(whole[1] / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    for tag, key in (("loss/train", "train_loss"), ("loss/held_out", "val_loss")):
        shown = {item.step: item.value for item in events.Scalars(tag)}
        logged = {
            record["round"]: np.float32(record[key])
            for record in records(whole[1])
            if record[key] is not None
        }
        assert shown == logged


def test_the_adapter_is_the_journals_and_peft_loads_it(whole):
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    run = whole[1]
    best = min(records(run)[1:], key=lambda record: record["val_loss"])["round"]
    assert best == journal_rounds(run)[-1] == ROUNDS  # so that the exported round is the one in the journal
    kept = {
        name.removeprefix("global/"): tensor
        for name, tensor in load_file(last_round(run) / "state.safetensors").items()
        if name.startswith("global/")
    }
    model = PeftModel.from_pretrained(LlamaForCausalLM(LlamaConfig(**LLAMA)), str(run / "adapter"))
    loaded = {name: parameter.numpy() for name, parameter in model.state_dict().items() if ".lora_" in name}
    assert loaded.keys() == kept.keys()
    assert all(np.array_equal(loaded[name], kept[name]) for name in kept)
    assert all(np.abs(tensor).max() > 0 for tensor in loaded.values())
    assert model.peft_config["default"].r == SETTINGS["adapter"]["lora_rank"]


def test_the_best_round_is_exported_and_the_last_one_beside_it(workshop, rises):
    arguments = ("federation.server_lr=3", "monitor.plot=false")
    run = rises
    losses = {record["round"]: record["val_loss"] for record in records(run)}
    best = min(losses, key=losses.get)
    assert 0 < best < ROUNDS, "else there is nothing to tell apart"
    workshop.finish_run("run.name=rises-no-more", f"federation.rounds={best}", *arguments)
    saved, last, shorter = (
        load_file(path / "adapter_model.safetensors")
        for path in (run / "adapter", run / "adapter-last", workshop.runs / "rises-no-more" / "adapter")
    )
    assert all(np.array_equal(saved[name], shorter[name]) for name in saved.keys() | shorter.keys())
    assert not all(np.array_equal(saved[name], last[name]) for name in saved)
    assert f"The adapter of round {best} " in (run / "report.md").read_text()


def test_a_run_that_no_round_makes_better_says_so_and_exports_its_start(workshop):
    """It also holds when the run is extended: rounds have to beat the start."""
    arguments = (
        "adapter.method=full",
        "federation.server_lr=1",
        "run.name=worse",
        "monitor.plot=false",
        "--json",
    )
    run = workshop.runs / "worse"
    for rounds in (1, 2):
        ended = workshop.finish_run(*arguments, f"federation.rounds={rounds}")
        losses = [record["val_loss"] for record in records(run)]
        summary = json.loads(ended.out.splitlines()[-1])
        assert len(losses) == rounds + 1 and min(losses[1:]) > losses[0] + 0.1
        assert (summary["best_round"], summary["best_val_loss"]) == (0, losses[0])
        said = f"no round beat the start, whose held-out loss is {losses[0]:.4f}"
        assert said in summary["reason"]
        top = (run / "report.md").read_text().partition("## Result")[0]
        assert said[1:] in top and ended.err.count("no round beat the start") == 1
        heads = [
            load_file(run / name / "model.safetensors")["lm_head.weight"] for name in ("model", "model-last")
        ]
        assert np.abs(heads[0]).max() < 0.2 < np.abs(heads[1]).mean(), (
            "as it was drawn, and after a step of 1 in every weight"
        )


def test_the_exported_folder_has_its_tokenizer(whole):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(whole[1] / "adapter")
    assert tokenizer.decode(tokenizer("Grüße, 4+4?", add_special_tokens=False).input_ids) == "Grüße, 4+4?"


def test_nothing_half_written_is_left(whole):
    left = [path for path in whole[1].rglob("*") if path.name.endswith((".tmp", ".part", ".old"))]
    assert left == []
