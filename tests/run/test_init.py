"""`fedspeed init`: the file that it writes loads, has comments, and passes every check that needs no run."""

import csv
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from fedspeed.cli import main
from fedspeed.config.load import FIELDS, load
from fedspeed.config.reference import meaning
from fedspeed.session.preflight import check
from tests.conftest import ROOT
from tests.run.launched import LLAMA

RUN = Path("run.yaml")
ROWS = [
    {
        "question": f"What is {i}?",
        "answer": f"It is {i}.",
        "context": None if i % 2 else "numbers",
        "topic": "ab"[i % 2],
        "id": i,
    }
    for i in range(60)
]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Return a working folder with rows in `rows/mine.jsonl`, a base in `base`, and two hosts in `hosts`."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "base").mkdir()
    write_rows(tmp_path / "rows" / "mine.jsonl", ROWS)
    (tmp_path / "base" / "config.json").write_text(json.dumps(LLAMA | {"max_position_embeddings": 512}))
    (tmp_path / "hosts").write_text(
        "a slots=2\nb slots=2\n# fed-host a gpu=rtx3090\n# fed-host b gpu=rtx3090\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def written(capsys, *arguments):
    """Return configuration, text of the file and output of `fedspeed init run.yaml arguments...`."""
    assert main(["init", "run.yaml", *arguments]) == 0
    return load(RUN), RUN.read_text(), capsys.readouterr().out


def refused(capsys, *arguments) -> str:
    assert main(["init", *arguments]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "clients", "split"),
    [("builtin", 4, "meta"), ("gsm8k", 3, "iid"), ("dolly", 8, "meta"), ("codealpaca", 9, "meta")],
)
def test_a_task_becomes_a_commented_configuration(project, capsys, task, clients, split):
    loaded, text, said = written(capsys, "--task", task)
    assert (loaded.config.data.task, loaded.config.data.clients, loaded.config.data.split) == (
        task,
        clients,
        split,
    )
    assert "run.yaml: written; check it with `python launch.py --config run.yaml --dry-run`" in said
    flat = " ".join(line.strip().removeprefix("# ") for line in text.splitlines())
    given = [key for key, source in loaded.sources.items() if source != "default" and key in FIELDS]
    assert len(given) > 12 and all(meaning(key) in flat for key in given)


def test_the_first_file_passes_the_dry_run(project, capsys):
    loaded, *_ = written(capsys)
    text = check(loaded, None)
    assert "builtin: 4 clients" in text and "pretrained on the spot" in text


def test_rows_of_ones_own_are_understood(project, capsys):
    loaded, _, said = written(capsys, "--data", "rows/mine.jsonl", "--model", "base")
    data = loaded.config.data
    assert (data.task, data.instruction_field, data.output_field, data.input_field, data.category_field) == (
        "file",
        "question",
        "answer",
        "context",
        "topic",
    )
    assert (
        "rows/mine.jsonl: instruction from 'question', input from 'context', answer from 'answer', category "
        "from 'topic' (2 categories), by the first "
        "60 rows; correct the YAML if this is not so"
    ) in said
    text = check(load(RUN, ["model.init=random"]), None)
    assert "file: 3 clients" in text


QUESTIONS = [str(i) for i in range(9)]
CHAT = [
    {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "a"}],
        "source": "xy"[i % 2],
    }
    for i, question in enumerate(QUESTIONS)
]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "a"}]}
    for question in QUESTIONS
]


@pytest.mark.parametrize(
    ("name", "rows", "form"),
    [
        ("chat.jsonl", CHAT, "messages"),
        ("chat.json", SHAREGPT, "sharegpt"),
        ("pairs.csv", [{"prompt": text, "completion": "a"} for text in QUESTIONS], "prompt_completion"),
        ("texts.tsv", [{"text": text, "title": "a"} for text in QUESTIONS], "text"),
        ("rows.parquet", ROWS, "instruction"),
        ("rows.csv", [{"": text, "question": "a", "answer": "b"} for text in QUESTIONS], "instruction"),
        ("all.jsonl", [row | {"instruction": "a", "output": "b"} for row in CHAT], "messages"),
    ],
)
def test_every_format_is_recognised_and_passes_the_dry_run(project, capsys, name, rows, form):
    write_file(project / "rows" / name, rows)
    loaded, _, said = written(capsys, "--data", f"rows/{name}", "--model", "base")
    data = loaded.config.data
    assert data.format == form and (f"format {form}, " in said or form == "instruction")
    if name in ("chat.jsonl", "rows.parquet"):
        assert data.category_field == ("source" if form == "messages" else "topic")
    assert "file: 3 clients" in check(load(RUN, ["model.init=random"]), None)


def test_a_folder_of_files_is_recognised(project, capsys):
    for number in range(3):
        write_file(project / "rows" / "own" / f"{number}.jsonl", CHAT)
    loaded, _, said = written(capsys, "--data", "rows/own", "--model", "base")
    assert loaded.config.data.path == "rows/own"
    assert "rows/own: 3 files, each a client, format messages, category from " in said
    assert (loaded.config.data.split, loaded.config.data.clients) == ("file", 3)
    text = check(load(RUN, ["model.init=random"]), None)
    assert "client 2: rows/own/2.jsonl" in text


def write_file(path, rows):
    path.parent.mkdir(exist_ok=True)
    kind = path.suffix
    if kind in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="," if kind == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == ".json":
        path.write_text(json.dumps(rows))
    else:
        write_rows(path, rows)


def test_rows_and_base_are_found_from_anywhere(project, capsys, monkeypatch):
    (project / "conf").mkdir()
    for path in ("rows/run.yaml", "conf/run.yaml"):
        monkeypatch.chdir(project)
        assert main(["init", path, "--data", "rows/mine.jsonl", "--model", "base"]) == 0
        monkeypatch.chdir("/")
        config = load(project / path).config
        assert config.data.path == str(project / "rows" / "mine.jsonl")
        assert config.model.base == str(project / "base")
    capsys.readouterr()


@pytest.mark.parametrize("name", ["someone/model", "gpt3-125m", "nosuch"])
def test_a_base_that_is_no_folder_here_keeps_its_name(project, capsys, name):
    (project / "conf").mkdir()
    assert main(["init", "conf/run.yaml", "--model", name]) == 0
    assert load(project / "conf" / "run.yaml").config.model.base == name
    capsys.readouterr()


def test_a_hostfile_gives_clients_and_the_command(project, capsys):
    loaded, text, said = written(capsys, "--hostfile", "hosts")
    assert loaded.config.data.clients == 2 and loaded.config.deepspeed == {"base": "zero3.json"}
    assert (
        "# Run it:    deepspeed --hostfile hosts launch.py --config run.yaml" in text
        and "hosts: 2 hosts, 4 ranks, 2 clients" in said
    )


def test_the_shipped_hostfile_serves(project, capsys):
    loaded, *_ = written(capsys, "--hostfile", str(ROOT / "hostfiles" / "hetero10"))
    assert (loaded.config.data.clients, loaded.config.data.split) == (10, "iid")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"title": "a", "body": "b"},
            "no field is called as an instruction usually is (instruction, question, ",
        ),
        ({"prompt": "a", "body": "b"}, "no field is called as an output usually is (output, response, "),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            "odd.jsonl:1: the conversation has no assistant message to train on (its roles are user)",
        ),
        ([1], "a record must be a JSON object"),
        (None, "the file holds no rows"),
    ],
)
def test_rows_that_cannot_be_understood_are_reported(project, capsys, row, said):
    write_rows(project / "rows" / "odd.jsonl", [] if row is None else [row] * 3)
    assert said in refused(capsys, "run.yaml", "--data", "rows/odd.jsonl")
    assert not (project / "run.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["there.yaml"], "there.yaml: exists already, and is not overwritten; move it, or give another name"),
        (["run.txt"], "run.txt: a run's configuration is a YAML file; give it a name such as run.txt.yaml"),
        (["no/run.yaml"], "no/run.yaml: there is no folder no; make it"),
        (
            ["run.yaml", "--task", "gsm8k", "--data", "rows/mine.jsonl"],
            "a run has the rows of one of them; leave the other out",
        ),
        (["run.yaml", "--data", "rows/none.jsonl"], "--data=rows/none.jsonl: no such file"),
        (["run.yaml", "--data", "hosts"], "unknown kind of file"),
        (["run.yaml", "--hostfile", "nowhere"], "nowhere"),
    ],
)
def test_nothing_is_written_over_and_mistakes_are_reported(project, capsys, arguments, said):
    (project / "there.yaml").write_text("mine")
    assert said in refused(capsys, *arguments)
    assert (project / "there.yaml").read_text() == "mine" and not (project / "run.yaml").exists()
