"""A launched run on a machine that lacks a package, a numeric type or space on the disk."""

import json
import os
import subprocess
import sys

import pytest

from tests.limits import LIMIT_S
from tests.run.launched import COLD, EVAL, ROOT, SETTINGS, last_round
from tests.run.refusing import assert_refused


@pytest.mark.slow
def test_16_bit_type_that_the_processor_lacks(workshop):
    """The environment variable makes the processor look like an older one."""
    assert_refused(
        workshop,
        "model.dtype=fp16",
        named=("model.dtype=fp16", "choose fp32"),
        env={"ONEDNN_MAX_CPU_ISA": "AVX2"},
        launcher=COLD,
    )


WITHOUT_PEFT = """
import importlib.util, json, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "peft" else find(name, *rest)
sys.argv = json.loads(sys.argv[1])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "arguments",
    [("launch.py",), ("launch.py", "--dry-run"), ("fedspeed/__main__.py", "pretrain-base", "new-base")],
)
def test_python_without_the_packages(workshop, arguments):
    """The interpreter is the system's own python when the virtual environment was not activated."""
    argv = [
        str(ROOT / arguments[0]),
        *arguments[1:],
        *(["--config", str(workshop.config)] if arguments[0] == "launch.py" else []),
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PEFT, json.dumps(argv)],
        cwd=workshop.folder,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(
        f"fedspeed: error: peft is not installed for {sys.executable}; activate the virtual environment"
    )
    assert (
        ".venv/bin/activate" in done.stderr and "doctor" in done.stderr and len(done.stderr.splitlines()) == 1
    )
    assert not (workshop.folder / "new-base").exists()


@pytest.fixture
def small_disk(workshop):
    folder = workshop.folder / "small-disk"
    folder.mkdir(exist_ok=True)
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=768k", "tmpfs", str(folder)], check=False
        ).returncode
    ):
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    workshop.close()
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(workshop, small_disk):
    """The run ends with one message at the round that no longer fits, and resumes from the round before once
    there is room.
    """
    arguments = (
        f"run.out={small_disk}",
        "run.name=full",
        "checkpoint.keep=30",
        "monitor.plot=false",
        "cluster.max_restarts=2",
    )
    ended = workshop.run(*arguments, "federation.rounds=30")
    assert ended.code == 2, ended.text
    assert "Traceback" not in ended.text, ended.text
    assert (
        "cannot be written (No space left on device)" in ended.err
        and "run.out=FOLDER" in ended.err
        and str(small_disk) in ended.err
    )
    assert "starting all ranks again" not in ended.err
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    run = small_disk / "full"
    number = int(last_round(run).name[-6:])
    assert 0 < number < 29
    workshop.finish_run(*arguments, f"federation.rounds={number + 1}")
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert SETTINGS["federation"]["rounds"] < 30


def test_scores_that_a_full_disk_does_not_take_are_shown(workshop, small_disk):
    rows = workshop.folder / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "copy", "input": "ab", "output": "ab"}) + "\n")
    (small_disk / "other").write_bytes(bytes(760 << 10))
    files = "--out", str(small_disk / "scores.json"), "--save-answers", str(small_disk / "answers")
    base = str(workshop.folder / "model"), "model.init=random", "model.tokenizer=bytes"
    options = "--held-out", str(rows), "--tasks", "held_out,exact_match", "cluster.local_ranks=1"
    ended = workshop.run(*base, *options, *files, command=EVAL)
    assert ended.code == 2 and "Traceback" not in ended.text, ended.text
    assert "cannot be written (No space left on device); make room there" in ended.err
    assert "held_out" in ended.out and "exact_match" in ended.out
