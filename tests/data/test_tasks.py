"""The table of tasks: where files are looked for, what becomes of their rows, and what is said when they are
missing.
"""

import json
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from fedspeed.data import tasks
from fedspeed.data.config import DataConfig
from fedspeed.data.rows import Row
from fedspeed.data.sources import FOLDER_VARIABLE
from fedspeed.data.tasks import TASKS, load_rows
from fedspeed.errors import DataError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is absent")
GSM = {"question": "2*3?", "answer": "2*3 = <<2*3=6>>6\n#### 6"}


def write(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A working directory with none of the usual places."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    return folder


def test_config_offers_exactly_the_tasks_there_are():
    assert set(get_args(get_type_hints(DataConfig)["task"])) == {"builtin", "file", *TASKS}


def test_gsm8k_row(bare):
    write(bare / "x.jsonl", GSM)
    assert load_rows(DataConfig(task="gsm8k", path="x.jsonl"), 0) == [
        Row("2*3?", "", "2*3 = <<2*3=6>>6\nThe answer is 6", "")
    ]


def test_gsm8k_row_without_result_is_refused(bare):
    write(bare / "x.jsonl", GSM, {"question": "?", "answer": "6"})
    with pytest.raises(DataError, match=r"x\.jsonl:2: .*#### result.*task=file"):
        load_rows(DataConfig(task="gsm8k", path="x.jsonl"), 0)


def test_dolly_and_codealpaca_rows(bare):
    write(bare / "d.jsonl", {"instruction": "a", "context": "b", "response": "c", "category": "open_qa"})
    write(
        bare / "c.jsonl",
        *({"instruction": "a", "input": language, "output": "p"} for language in ("Go", "X86-64 Assembly")),
    )
    assert load_rows(DataConfig(task="dolly", path="d.jsonl"), 0) == [Row("a", "b", "c", "open_qa")]
    assert load_rows(DataConfig(task="codealpaca", path="c.jsonl"), 0) == [Row("a", "Go", "p", "Go")]


def test_file_task_uses_the_configured_fields(bare):
    write(bare / "x.jsonl", {"q": "a", "c": "b", "a": "c", "k": "d"})
    config = DataConfig(
        task="file",
        path="x.jsonl",
        instruction_field="q",
        input_field="c",
        output_field="a",
        category_field="k",
    )
    assert load_rows(config, 0) == [Row("a", "b", "c", "d")]


def test_usual_places_in_order(bare, monkeypatch):
    def question():
        return load_rows(DataConfig(task="gsm8k"), 0)[0].instruction

    write(bare.parent / "shared" / "data" / "gsm8k_train.jsonl", GSM | {"question": "shared"})
    assert question() == "shared"
    write(bare / "data" / "gsm8k_train.jsonl", GSM | {"question": "data"})
    assert question() == "data"
    write(bare.parent / "mine" / "gsm8k_train.jsonl", GSM | {"question": "variable"})
    monkeypatch.setenv(FOLDER_VARIABLE, str(bare.parent / "mine"))
    assert question() == "variable"
    write(bare.parent / "named" / "gsm8k_train.jsonl", GSM | {"question": "path"})
    assert load_rows(DataConfig(task="gsm8k", path=str(bare.parent / "named")), 0)[0].instruction == "path"


def test_missing_file_says_where_it_looked_and_how_to_get_it(bare, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(bare / "v"))
    with pytest.raises(DataError) as error:
        load_rows(DataConfig(task="gsm8k"), 0)
    words = (
        bare / "v",
        bare / "data",
        bare.parent / "shared" / "data",
        "gsm8k_train.jsonl.gz",
        "data.path",
        "openai/grade-school-math",
    )
    assert [word for word in map(str, words) if word not in str(error.value)] == []


def test_a_wrong_path_is_an_error_even_where_the_usual_places_have_the_file(bare):
    write(bare / "data" / "gsm8k_train.jsonl", GSM)
    (bare / "empty").mkdir()
    for path, words in (("absent.jsonl", "no such file or folder"), ("empty", "holds no file of task gsm8k")):
        with pytest.raises(DataError, match=f"data.path={path}: .*{words}.*openai/grade-school-math"):
            load_rows(DataConfig(task="gsm8k", path=path), 0)


def test_file_task_reads_all_files_of_a_folder(bare):
    with pytest.raises(DataError, match="task=file needs data.path"):
        load_rows(DataConfig(task="file"), 0)
    write(bare / "f" / "a.jsonl", {"instruction": "a", "output": "b"})
    assert len(load_rows(DataConfig(task="file", path="f"), 0)) == 1
    write(bare / "f" / "b.jsonl", {"instruction": "a", "output": "b"})
    assert len(load_rows(DataConfig(task="file", path="f"), 0)) == 2


def test_only_names_of_the_form_owner_slash_name_are_hub_sets(bare, monkeypatch):
    asked = []
    monkeypatch.setattr(
        tasks, "hub_rows", lambda name, fields: asked.append(name) or [("x", Row("a", "", "#### 1", ""))]
    )
    for path in ("openai/gsm8k:main", "owner/name"):
        assert load_rows(DataConfig(task="gsm8k", path=path), 0)[0].output == "The answer is 1"
    for path in ("folder/rows.jsonl", "/a/b/c", "name"):
        with pytest.raises(DataError, match="no such file or folder"):
            load_rows(DataConfig(task="gsm8k", path=path), 0)
    write(bare / "folder" / "rows", GSM)
    with pytest.raises(DataError, match="folder/rows: unknown kind of file"):
        load_rows(DataConfig(task="gsm8k", path="folder/rows"), 0)
    assert asked == ["openai/gsm8k:main", "owner/name"]


def test_max_rows_keeps_a_seeded_choice_in_order(bare):
    write(bare / "x.jsonl", *({"instruction": f"{i:02d}", "output": "b"} for i in range(50)))

    def kept(max_rows, seed=0):
        return [
            row.instruction
            for row in load_rows(DataConfig(task="file", path="x.jsonl", max_rows=max_rows), seed)
        ]

    assert len(kept(10)) == 10 and kept(10) == sorted(kept(10)) and kept(10) == kept(10)
    assert kept(10) != kept(10, seed=1)
    assert len(kept(0)) == len(kept(50)) == len(kept(99)) == 50


def test_builtin_takes_max_rows_as_its_size():
    assert len(load_rows(DataConfig(max_rows=7), 0)) == 7
    assert len(load_rows(DataConfig(), 0)) == 3000


@needs_shared
def test_shared_files_have_the_published_counts(monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(SHARED))
    rows = {task: load_rows(DataConfig(task=task), 0) for task in TASKS}
    assert {task: len(of) for task, of in rows.items()} == {"gsm8k": 7473, "dolly": 15011, "codealpaca": 7955}
    assert {task: len({row.category for row in of}) for task, of in rows.items()} == {
        "gsm8k": 1,
        "dolly": 8,
        "codealpaca": 9,
    }
    assert all(
        row.output.splitlines()[-1].startswith("The answer is ") and "####" not in row.output
        for row in rows["gsm8k"]
    )
