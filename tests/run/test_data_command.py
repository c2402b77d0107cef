"""`fedspeed data`, and the configurations of the published tasks that it shows."""

import json
import re
import subprocess
import sys

import pytest

from fedspeed.cli import main
from fedspeed.config.load import load
from fedspeed.data.sources import data_folders
from fedspeed.session.dry_run import dry_run
from fedspeed.session.request import RunRequest
from tests.conftest import ROOT
from tests.limits import LIMIT_S
from tests.smollm2 import smollm2

FILES = {"gsm8k": "gsm8k_train", "dolly": "dolly_15k", "codealpaca": "fed_codealpaca"}


def data_of(task):
    """Skip the test where the data of a published task is absent."""
    if not any((folder / f"{FILES[task]}.jsonl.gz").is_file() for folder in data_folders()):
        pytest.skip(f"no data of {task}: {FILES[task]}.jsonl.gz is in none of the data folders")


def shown(capsys, *arguments):
    assert main(["data", *arguments]) == 0
    return capsys.readouterr().out


def test_a_task_by_name_is_its_shipped_configuration(capsys):
    """The categories of the quickstart are split over its four clients."""
    clients = json.loads(shown(capsys, "builtin", "data.max_rows=120", "--json"))["clients"]
    assert [client["client"] for client in clients] == [0, 1, 2, 3]
    names = [name for client in clients for name in client["categories"]]
    assert len(names) == len(set(names)) >= 4
    assert sum(client["train_rows"] + client["held_out_rows"] for client in clients) == 120


def test_a_configuration_its_overrides_and_one_client(capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("model: {base: none, tokenizer: bytes}\ndata: {max_rows: 60}\n")
    arguments = ["--config", str(tmp_path / "run.yaml"), "data.clients=2", "--client", "1"]
    arguments += ["--out", str(tmp_path / "split"), "--plot", str(tmp_path / "a.png")]
    text = shown(capsys, *arguments)
    assert "example of client 1" in text and "example of client 0" not in text
    files = {path.name for path in (tmp_path / "split").iterdir()}
    assert files == {"train-client-0.jsonl", "train-client-1.jsonl", "held-out.jsonl", "split.png"}
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "name either a task"),
        (["gsm8k", "--config", "x.yaml"], "name either a task"),
        (["gsm9k"], "'gsm9k' is no task; choose one of builtin, gsm8k"),
        (["builtin", "--client", "4"], "numbered from 0 to 3"),
        (["builtin", "data.max_rows=40", "--plot", "/proc/a.png"], "/proc/a.png: cannot be written"),
        (["builtin", "data.max_rows=40", "--out", "/proc/split"], "/proc/split.*cannot be written"),
    ],
)
def test_what_is_refused(capsys, arguments, message):
    assert main(["data", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_no_torch_is_needed():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from fedspeed.cli import main; sys.exit(main(['data', 'builtin', 'data.max_rows=40']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0 and "example of client 0" in done.stdout, done.stderr


@pytest.mark.parametrize("task", FILES)
@pytest.mark.parametrize("variant", ["", pytest.param("_smol", marks=pytest.mark.slow)])
def test_the_published_tasks_pass_the_dry_run(task, variant):
    """On a model that is here: of the full configurations, only the base is replaced."""
    data_of(task)
    overrides = [f"model.base={smollm2()}", "data.max_rows=300", f"run.name=dry-{task}"]
    for more in [], ["data.split=lda", "data.clients=3"]:
        if more and (variant or task == "gsm8k"):  # its rows have no categories
            continue
        loaded = load(ROOT / "ds_configs" / f"{task}{variant}.yaml", [*overrides, *more])
        text = dry_run(RunRequest(loaded))
        assert f"{task}: {loaded.config.data.clients} clients" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "task, rows, largest", [("gsm8k", 7473, ""), ("dolly", 15011, "open_qa"), ("codealpaca", 7955, "Python")]
)
def test_all_rows_of_a_published_task_are_shown(capsys, task, rows, largest):
    data_of(task)
    view = json.loads(shown(capsys, task, f"model.tokenizer={smollm2()}", "--json"))
    assert view["rows"] == rows and view["max_tokens"] == (1000 if task == "gsm8k" else 650)
    if largest:
        biggest = max(view["clients"], key=lambda client: client["train_rows"])
        assert list(biggest["categories"]) == [largest]
