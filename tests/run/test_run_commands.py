"""Commands that only read: they answer without the heavy libraries, and start and write nothing."""

import json
import os
import subprocess
import sys

import pytest

from tests.limits import LIMIT_S
from tests.run.launched import ROOT, tree

HEAVY = ("torch", "deepspeed", "transformers", "peft", "mpi4py", "matplotlib", "tensorboard")
PROBE = f"""
import json, sys
from fedspeed.cli import main
try:
    code = main(json.loads(sys.argv[1]))
except SystemExit as end:
    code = end.code or 0
print(json.dumps([code, [name for name in {HEAVY!r} if name in sys.modules]]))
"""


def ask(*arguments: str, cwd) -> tuple[int, list[str], str]:
    """Return the exit code of a command, the heavy libraries that it imported, and its output."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )
    *said, last = done.stdout.splitlines()
    return *json.loads(last), "\n".join(said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--help",), "doctor"),
        (("run", "--help"), "exit codes:"),
        (("--version",), "fedspeed "),
        (("run", "--print-config"), "# What DeepSpeed receives"),
        (("doctor",), "checks passed"),
        (("eval", "--list"), "held_out "),
        (("config-reference",), "| `train.lr` | "),
    ],
)
def test_answers_without_heavy_libraries(workshop, arguments, said):
    options = ("--config", str(workshop.config)) if arguments[-1] == "--print-config" else ()
    before = tree(workshop.folder)
    code, heavy, text = ask(*arguments, *options, cwd=workshop.folder)
    assert said in text
    assert heavy == []
    assert code == 0 or arguments == ("doctor",)
    assert tree(workshop.folder) == before


def test_the_probe_sees_a_heavy_library(workshop):
    done = subprocess.run(
        [sys.executable, "-c", PROBE.replace("import json", "import tensorboard, json", 1), '["--version"]'],
        cwd=workshop.folder,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )
    assert '["tensorboard"]' in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [("run", "--print-config"), pytest.param(("run", "--dry-run"), marks=pytest.mark.slow), ("doctor",)],
)
def test_output_that_cannot_be_written(workshop, arguments):
    options = ("--config", str(workshop.config)) if arguments[0] == "run" else ()
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fedspeed", *arguments, *options],
            cwd=workshop.folder,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    assert done.returncode == 2
    assert (
        done.stderr
        == "fedspeed: error: standard output cannot be written (No space left on device); send it elsewhere\n"
    )


def test_a_reader_that_goes_away_is_no_fault(workshop):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "fedspeed", "run", "--print-config", "--config", str(workshop.config)],
        cwd=workshop.folder,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def base_files(folder, names):
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{}")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.write_text("mine"), "is a file; name a folder"),
        (
            lambda folder: base_files(folder, ["config.json"]),
            "is an incomplete base, without model.safetensors, tokenizer.json; delete the folder",
        ),
        (
            lambda folder: base_files(folder, ["notes.txt"]),
            "is not empty and holds no base (notes.txt, ...); delete the folder, or name another",
        ),
    ],
)
def test_pretrain_base_refuses_a_place_before_it_trains(tmp_path, make, message):
    folder = tmp_path / "base"
    make(folder)
    before = tree(tmp_path)
    code, heavy, _ = ask("pretrain-base", str(folder), cwd=tmp_path)
    assert (code, heavy) == (2, [])
    done = subprocess.run(
        [sys.executable, "-m", "fedspeed", "pretrain-base", str(folder)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith(f"fedspeed: error: {folder}: {message}")
        and done.stdout == ""
    )
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("/proc/base",), "/proc/base: cannot be written"),
        (("base", "--seed", "-1"), "--seed"),
        (("base", "--seed", "4294967296"), "at most 4294967295"),
        (("",), "is empty; name a file"),
    ],
)
def test_pretrain_base_refuses_its_arguments(tmp_path, arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "fedspeed", "pretrain-base", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (
        done.returncode == 2
        and message in done.stderr
        and "Traceback" not in done.stderr
        and tree(tmp_path) == {}
    )


def test_pretrain_base_leaves_a_whole_one_alone(tmp_path):
    base_files(tmp_path / "base", ["config.json", "model.safetensors", "tokenizer.json"])
    before = tree(tmp_path)
    assert ask("pretrain-base", str(tmp_path / "base"), cwd=tmp_path)[0] == 0
    assert tree(tmp_path) == before


def test_a_warm_up_that_never_ends_is_noted_by_dry_run(workshop):
    assert (
        "note     train.warmup_steps=99, but the run has only 4 x 3 local steps"
        in workshop.finish_run("--dry-run", "train.warmup_steps=99").out
    )


def test_dry_run_tells_what_would_run_where(workshop):
    ended = workshop.finish_run("--dry-run", "data.clients=4")
    for line in (
        "(llama, weights drawn from run.seed)",
        "builtin: 4 clients",
        "cluster  default: 2 ranks, clients 0 to 3",
        "ZeRO-0, 4 rounds",
    ):
        assert line in ended.out
    assert ended.err == ""


def test_dry_run_gathers_the_faults_of_all_parts(workshop):
    ended = workshop.run("--dry-run", "model.base=/nowhere", "data.max_rows=2", "cluster.ranks_per_client=9")
    assert ended.code == 2 and ended.out == ""
    for part in ("model.base: /nowhere", "2 rows are too few", "cluster.ranks_per_client=9"):
        assert part in ended.err


def test_print_config_loads_back_to_the_same(workshop):
    first = workshop.finish_run("--print-config", "train.lr=0.5").out
    assert "lr: 0.5" in first and "# command line" in first and f"# {workshop.config}:" in first
    path = workshop.folder / "printed.yaml"
    path.write_text(first)
    again = workshop.finish_run("--print-config", config=path).out

    def values(text: str) -> list[str]:
        return [line.partition("  # ")[0].rstrip() for line in text.splitlines()]

    assert values(again) == values(first)


def test_overrides_and_options_stand_in_any_order(workshop):
    ended = workshop.finish_run(
        "data.clients=2", "--dry-run", "federation.rounds=7", "--json", "data.split=iid", "data.max_rows=100"
    )
    assert "2 clients, training + held-out rows 45+5, 45+5" in ended.out and "7 rounds" in ended.out


@pytest.mark.parametrize(
    "door", [pytest.param(("-m", "fedspeed", "run"), marks=pytest.mark.slow), (str(ROOT / "launch.py"),)]
)
def test_both_doors_lead_to_the_same_run_command(workshop, door):
    done = subprocess.run(
        [sys.executable, *door, "--config", str(workshop.config), "--dry-run"],
        cwd=workshop.folder,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )
    assert "nothing was started" in done.stdout
