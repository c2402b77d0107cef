"""What users get wrong, and what the commands answer: each mistake is refused with one message before
anything is started or written.

The commands run in this process, because nothing that is checked here needs a rank. `test_run_bad_input.py`
shows that a launched run ends in the same way on all of its ranks.
"""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from fedspeed.cli import main
from tests.run.launched import LLAMA, SETTINGS, tree
from tests.run.mistakes import model
from tests.run.mistakes_in_commands import COMMAND_LINE, CONFIGURATION, HOSTS
from tests.run.mistakes_in_inputs import DATA, MODELS
from tests.tiny import write_llama

KINDS = {
    "command line": COMMAND_LINE,
    "configuration": CONFIGURATION,
    "hosts": HOSTS,
    "data": DATA,
    "models": MODELS,
}
MISTAKES = {f"{kind}: {name}": mistake for kind, table in KINDS.items() for name, mistake in table.items()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Return the working folder, with a model's config.json and the YAML of a run."""
    monkeypatch.chdir(tmp_path)
    model("model", LLAMA)(tmp_path)
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({
            **SETTINGS,
            "model": {"base": "model", **SETTINGS["model"]},
            "monitor": {"progress": False},
        })
    )
    return tmp_path


def run_command(arguments: str, monkeypatch, capfd) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of a command that must not start anything."""

    def start(*_):
        raise AssertionError("nothing has refused it")

    monkeypatch.setattr("fedspeed.session.local_run.supervise", start)
    argv = shlex.split(arguments)
    if argv[:1] == ["run"] and "--config" not in argv:
        argv += ["--config", "run.yaml"]
    try:
        code = main(argv)
    except SystemExit as ended:
        code = ended.code
    return code, *capfd.readouterr()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused_at_once(here, monkeypatch, capfd, name):
    mistake = MISTAKES[name]
    mistake.files(here)
    before = tree(here)
    code, out, err = run_command(mistake.arguments + " --dry-run" * mistake.dry, monkeypatch, capfd)
    print(err)
    assert code == 2 and out == "", err
    assert "Traceback" not in err and err.count(": error:") == 1
    assert [text for text in mistake.says if text not in err] == []
    assert tree(here) == before


@pytest.mark.parametrize(
    "arguments",
    [
        "run train.lr=fast",
        "run --fast",
        "run model.base=nosuch",
        "run model.base=nosuch --dry-run",
        "plan --model gpt3-125m",
        "plan --hostfile nosuch --model gpt3-125m",
        "simulate --hostfile nosuch",
        "audit train.lr=fast",
        "audit --modes=none",
    ],
)
def test_a_mistake_is_reported_as_json_too(here, monkeypatch, capfd, arguments):
    code, out, err = run_command(f"{arguments} --json", monkeypatch, capfd)
    (line,) = out.splitlines()
    found = json.loads(line)
    assert (code, found["event"], found["exit_code"]) == (2, "error", 2)
    assert f"error: {found['error']}\n" in err


def test_what_a_base_has_no_place_for_is_noted(here, monkeypatch, capfd):
    weights = Path(write_llama(here / "base")) / "model.safetensors"
    save_file(load_file(weights) | {"model.norm.bias": np.ones(64, np.float32)}, weights, {"format": "pt"})
    code, out, err = run_command("run model.init=pretrained model.base=base --dry-run", monkeypatch, capfd)
    assert code == 0, err
    assert (
        "note     base: 1 tensor has no place in the model of config.json and is not used: model.norm.bias"
        in out
    )


@pytest.mark.parametrize(
    "arguments", ["engine.tier=stock", "adapter.method=full", "adapter.targets=[lm_head] --dry-run"]
)
def test_what_deepspeeds_nvme_offload_lacks_is_reported_at_once(here, monkeypatch, capfd, arguments):
    """Whatever leads to stock execution is refused. The dry run and the ranks, but not the supervisor, know
    which parameters outside the blocks are trained.
    """
    monkeypatch.setenv("CC", "no-such-compiler")
    code, _, err = run_command(f"run deepspeed.base=zero3_nvme.json {arguments}", monkeypatch, capfd)
    assert (
        code == 2
        and "needs DeepSpeed's async_io" in err
        and "a C compiler (`no-such-compiler`): apt install gcc" in err
    )


def test_the_table_is_long_enough_and_the_check_can_fail(here, monkeypatch, capfd):
    assert len(MISTAKES) >= 80
    with pytest.raises(AssertionError, match="nothing has refused it"):
        run_command("run", monkeypatch, capfd)
