"""Bad input ends a launched run at once, on all ranks, with one message that names the fault and the remedy,
and leaves no file behind.

`test_mistakes.py` lists the messages; the mistakes here need a run, a journal or a process.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.run.launched import LLAMA, headline, last_round, refusal, tree
from tests.run.refusing import SOON_S, assert_refused


def model_folder(workshop, name: str, config: dict | str | None = None, weights: dict | None = None) -> Path:
    folder = workshop.folder / name
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if weights is not None:
        save_file(weights, folder / "model.safetensors")
    return folder


def cut(path: Path, bytes_left: int) -> None:
    with path.open("rb+") as file:
        file.truncate(bytes_left)


# The command line and the configuration.


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("train.lr=fast",), ("command line", "train.lr", "fast")),
        (("--hostfile", "nowhere"), ("nowhere", "no such hostfile", "NAME slots=N")),
        (
            ("model.base=gone/", "data.max_rows=2"),
            ("gone/", "does not exist", "2 rows are too few for 3 clients"),
        ),
    ],
)
def test_command_line(workshop, arguments, named):
    assert_refused(workshop, *arguments, named=named, limit_s=SOON_S)


def test_unknown_option(workshop):
    ended = workshop.run("--hostfiles", "x", limit_s=SOON_S)
    assert ended.code == 2 and "--hostfiles" in ended.err and "Traceback" not in ended.err
    assert "--hostfiles" in refusal(workshop.run("--json", "--hostfiles", "x", limit_s=SOON_S))


# Data.


def test_one_client_whose_answers_are_all_cut_away_ends_every_rank(workshop):
    """Only the rank of that client detects it; the others must not wait for it."""
    path = workshop.folder / "long.jsonl"
    rows = [{"instruction": "1 + 1 =", "output": "2", "category": "short"}] * 20
    rows += [{"instruction": "one " * 50 + "=", "output": "50", "category": "long"}] * 20
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = assert_refused(
        workshop,
        "--json",
        "data.task=file",
        "data.template=plain",
        "data.clients=2",
        f"data.path={path}",
        named=("data.max_tokens=64", "whole answer", "training rows", "raise data.max_tokens"),
    )
    assert "restart" not in ended.err


# Models and adapters.


def test_tokenizer_with_more_ids_than_the_base_knows(workshop):
    folder = model_folder(
        workshop,
        "small-vocabulary",
        {**LLAMA, "vocab_size": 10, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    )
    assert_refused(
        workshop,
        f"model.base={folder}",
        named=(f"model.base={folder}", "vocab_size=10", "ids up to 258", "model.tokenizer=bytes"),
    )


def adapter_folder(workshop, whole, name: str) -> Path:
    return Path(shutil.copytree(whole[1] / "adapter", workshop.folder / name))


def test_adapter_whose_files_disagree(workshop, whole):
    folder = adapter_folder(workshop, whole, "adapter-r")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 16}))
    assert_refused(
        workshop,
        f"adapter.start_from={folder}",
        named=(str(folder / "adapter_model.safetensors"), "r=16", "shape (4, 64)"),
        limit_s=SOON_S,
    )


def test_adapter_of_another_lora_rank_than_the_run_asks_for(workshop, whole):
    folder = adapter_folder(workshop, whole, "adapter-8")
    assert_refused(
        workshop,
        f"adapter.start_from={folder}",
        "adapter.lora_rank=8",
        named=("adapter.lora_rank=8", str(folder), "r=4"),
        limit_s=SOON_S,
    )


@pytest.mark.parametrize(
    ("targets", "good"),
    [("all-linear", False), ("[q_proj]", False), ("attention", True), ("[v_proj, q_proj]", True)],
)
def test_adapter_on_other_targets_than_the_run_asks_for(workshop, whole, targets, good):
    folder = adapter_folder(workshop, whole, f"adapter-on-{targets}")
    arguments = (f"adapter.start_from={folder}", f"adapter.targets={targets}")
    if good:
        workshop.finish_run("--dry-run", *arguments)
    else:
        assert_refused(
            workshop,
            *arguments,
            named=(f"adapter.targets={targets}", str(folder), "is on [q_proj, v_proj]"),
            limit_s=SOON_S,
        )


def test_adapter_that_is_not_a_number(workshop, whole):
    """Nothing has been trained yet, so no learning rate can be at fault."""
    folder = adapter_folder(workshop, whole, "adapter-nan")
    file = folder / "adapter_model.safetensors"
    save_file({name: np.full_like(tensor, np.nan) for name, tensor in load_file(file).items()}, file)
    ended = workshop.run(f"adapter.start_from={folder}", "run.name=nan", "monitor.plot=false")
    assert ended.code == 2 and "Traceback" not in ended.err and "starting all ranks again" not in ended.err, (
        ended.text
    )
    assert (
        "not finite before any training" in ended.err
        and "adapter.start_from" in ended.err
        and "train.lr" not in ended.err
    )
    assert headline(workshop.runs / "nan") == "# Run `nan`: failed"


def test_truncated_adapter(workshop, whole):
    folder = adapter_folder(workshop, whole, "adapter-cut")
    cut(folder / "adapter_model.safetensors", 500)
    assert_refused(
        workshop,
        f"adapter.start_from={folder}",
        named=(str(folder / "adapter_model.safetensors"), "truncated"),
        limit_s=SOON_S,
    )


# The journal and the disk.


@pytest.mark.parametrize("file", ["entry.json", "state.safetensors"])
@pytest.mark.parametrize("bytes_left", [0, 100])
def test_truncated_journal(workshop, copy_of_whole, file, bytes_left):
    run = copy_of_whole(f"journal-{file}-{bytes_left}")
    path = last_round(run) / file
    cut(path, bytes_left)
    assert_refused(
        workshop,
        "federation.rounds=9",
        run=run.name,
        named=(str(path), "damaged", str(path.parent), "--fresh"),
        limit_s=SOON_S,
    )


def test_missing_state(workshop, copy_of_whole):
    run = copy_of_whole("journal-gone")
    path = last_round(run) / "state.safetensors"
    path.unlink()
    assert_refused(
        workshop, "federation.rounds=9", run=run.name, named=(str(path), "damaged", "--fresh"), limit_s=SOON_S
    )


@pytest.mark.parametrize("damage", [lambda path: cut(path, 100), Path.unlink])
def test_best_round_that_is_lost(workshop, rises, damage):
    """The best round is needed at the end only, but is checked before the training and by --dry-run."""
    run = Path(shutil.copytree(rises, workshop.runs / "best-lost"))
    try:
        path = max((run / "journal").glob("best-*.safetensors"))
        damage(path)
        for arguments in (("federation.rounds=9",), ("federation.rounds=9", "--dry-run")):
            assert_refused(
                workshop,
                *arguments,
                "federation.server_lr=3",
                run=run.name,
                named=(str(path), "cannot be read", "--fresh"),
                limit_s=SOON_S,
            )
    finally:
        shutil.rmtree(run)


def test_best_round_that_is_lost_but_is_the_newest(workshop, copy_of_whole):
    run = copy_of_whole("best-newest")
    best = max((run / "journal").glob("best-*.safetensors"))
    content = best.read_bytes()
    best.unlink()
    shutil.rmtree(run / "adapter")
    workshop.finish_run("run.name=best-newest", "monitor.plot=false")
    assert best.read_bytes() == content


def test_truncated_optimizer_of_one_client_ends_every_rank(workshop, copy_of_whole):
    """Only the rank of that client reads it."""
    run = copy_of_whole("journal-client")
    path = last_round(run) / "client-2.safetensors"
    cut(path, 100)
    before = tree(run)
    ended = workshop.run(f"run.name={run.name}", "federation.rounds=9")
    assert ended.code == 2 and "Traceback" not in ended.text, ended.text
    assert f"{path}: cannot be read" in ended.err and "--fresh" in ended.err
    assert tree(run) == before


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda run: run.write_text("mine"), ("is a file", "run.name")),
        (lambda run: (run / "report.md").mkdir(parents=True), ("report.md", "is a folder", "move it away")),
        (
            lambda run: (run.mkdir(), (run / "journal").write_text("mine")),
            ("journal", "is a file", "move it away"),
        ),
    ],
)
def test_name_that_is_taken(workshop, make, named):
    run = workshop.runs / "taken"
    workshop.runs.mkdir(exist_ok=True)
    make(run)
    try:
        assert_refused(workshop, run="taken", named=(str(run), *named), limit_s=SOON_S)
    finally:
        shutil.rmtree(run) if run.is_dir() else run.unlink()


def test_run_that_another_process_is_at_work_on(workshop, copy_of_whole):
    run = copy_of_whole("claimed")
    descriptor = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert_refused(
            workshop,
            "--dry-run",
            run="claimed",
            named=(str(run), "another process is at work"),
            limit_s=SOON_S,
        )
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("adapter.targets=[nothing]",), ("adapter.targets=[nothing]", "it has q_proj, k_proj")),
        (("train.lr=1", "run.name=whole"), ("train.lr: 0.003 -> 1.0",)),
    ],
)
def test_dry_run_finds_what_the_run_would_refuse(workshop, whole, arguments, named):
    before = tree(workshop.folder)
    ended = workshop.run("--dry-run", *arguments)
    assert ended.code == 2 and "Traceback" not in ended.text and ended.err.count("fedspeed: error:") == 1, (
        ended.text
    )
    for word in named:
        assert word in ended.err
    assert {name for name in tree(workshop.folder) if not name.startswith("logs")} == {
        name for name in before if not name.startswith("logs")
    }


def test_changed_keys_that_matter_are_reported_alone(workshop, whole):
    ended = assert_refused(
        workshop,
        "train.lr=1",
        "federation.rounds=9",
        "checkpoint.keep=7",
        run="whole",
        named=("(train.lr: 0.003 -> 1.0)",),
        limit_s=SOON_S,
    )
    assert "checkpoint" not in ended.err and "rounds:" not in ended.err


def test_it_is_all_of_a_refusal_that_is_checked(workshop):
    """`assert_refused` fails if a message lacks a text, and if the run is not refused."""
    with pytest.raises(AssertionError):
        assert_refused(workshop, "train.lr=fast", named=("no such word",), limit_s=SOON_S)
    with pytest.raises(AssertionError):
        assert_refused(workshop, "--dry-run", named=(), limit_s=SOON_S)


def test_what_a_forecast_does_not_know_ends_no_run(workshop):
    """PEFT accepts a part of a module name, the planner does not: the run trains and exports all the same."""
    workshop.finish_run(
        "adapter.targets=[layers.0.self_attn.q_proj,v_proj]", "run.name=parts", "federation.rounds=1"
    )
    assert (workshop.runs / "parts" / "adapter" / "adapter_model.safetensors").exists()
    assert "predicted" not in (workshop.runs / "parts" / "report.md").read_text()


def test_an_adapter_outside_the_blocks_is_not_for_streamed_tiers(workshop):
    ended = workshop.run("adapter.targets=[q_proj,lm_head]", "run.name=outside", "engine.tier=ram")
    assert ended.code == 2 and "Traceback" not in ended.text
    assert "lm_head" in ended.text and "set engine.tier=stock" in ended.text
