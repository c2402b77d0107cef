"""The files that data.path and data.held_out name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedspeed.config.load import load
from fedspeed.data.config import DataConfig
from fedspeed.data.sources import Wanted, files_of
from fedspeed.data.tasks import held_out_rows, load_rows
from fedspeed.errors import ConfigError, DataError
from fedspeed.session.request import RunRequest

WANTED = Wanted("data.path", "file")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder with twelve data files and other files; its parent is the working folder."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for number in range(12):
        record = {"instruction": str(number), "output": "a"}
        (folder / f"site{number}.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "README.md").write_text("rows")
    (folder / "._site1.jsonl").write_text("written by another system")
    monkeypatch.chdir(tmp_path)
    return folder


def names(value) -> list[str]:
    return [path.name.removesuffix(".jsonl") for path in files_of(value, WANTED)]


ALL = [f"site{number}" for number in range(12)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("rows/site3.jsonl", ["site3"]),
        ("rows", ALL),
        ("rows/*.jsonl", ALL),
        ("**/site1?.jsonl", ["site10", "site11"]),
        ("rows/site[42].jsonl", ["site2", "site4"]),
        ("rows/site4.jsonl, rows/site2.jsonl,", ["site4", "site2"]),
        (("rows/site4.jsonl", "rows/site1?.jsonl"), ["site4", "site10", "site11"]),
    ],
)
def test_files_and_their_order(folder, value, expected):
    assert names(value) == expected


def test_names_that_exist_are_neither_patterns_nor_lists(folder):
    for name in ("site[42].jsonl", "a,b.jsonl"):
        (folder / name).write_text("")
        assert [path.name for path in files_of(f"rows/{name}", WANTED)] == [name]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("rows/*.csv", "data.path=rows/[*].csv: no file matches the pattern .looked for .*rows/"),
        (("rows/site1.jsonl", "rows/gone.jsonl"), "data.path=rows/gone.jsonl: no such file or folder"),
        ("rows/site1.jsonl,rows", "data.path=rows/site1.jsonl,rows: .*site1.jsonl is named twice"),
        (",", "data.path=,: names no file"),
        ("~no-one/a.csv", "data.path=~no-one/a.csv: cannot be looked for .Could not determine home"),
        ("a" * 300, "data.path=a{200}[.]{3}: cannot be looked for .File name too long.; correct the path"),
        ("empty", "data.path=empty: the folder holds no data file, whose name would end in .json, .jsonl"),
    ],
)
def test_faults(folder, value, message):
    (folder.parent / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        files_of(value, WANTED)


def test_held_out_rows_are_of_no_hub_set(folder):
    with pytest.raises(DataError, match="data.held_out=org/set: no such .*of the hub, only data.path reads"):
        files_of("org/set", replace(WANTED, key="data.held_out"))


def test_rows_of_several_files_follow_each_other(folder):
    rows = load_rows(DataConfig(task="file", path="rows/site1*.jsonl"), 0)
    assert [row.instruction for row in rows] == ["1", "10", "11"]
    config = DataConfig(task="file", path="rows", held_out=("rows/site2.jsonl", "rows/site0.jsonl"))
    assert [row.instruction for row in held_out_rows(config)] == ["2", "0"]


def test_a_held_out_file_of_a_task_is_read_as_its_rows_are(folder):
    record = {"question": "?", "answer": "2\n#### 2"}
    (folder / "test.jsonl").write_text(json.dumps(record) + "\n")
    config = DataConfig(task="gsm8k", held_out="rows/test.jsonl")
    assert [row.output for row in held_out_rows(config)] == ["2\nThe answer is 2"]
    with pytest.raises(DataError, match="data.held_out=gone.jsonl: no such file"):
        held_out_rows(DataConfig(task="gsm8k", held_out="gone.jsonl"))


def written(folder: Path, path: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(f"model:\n  base: m\ndata:\n  task: file\n  path: {path}\n")
    return file


@pytest.mark.parametrize(
    ("value", "resolved"),
    [
        ("site*.jsonl", "{folder}/site*.jsonl"),
        ("[site4.jsonl, site2.jsonl]", ("{folder}/site4.jsonl", "{folder}/site2.jsonl")),
        ("site4.jsonl, rows/site2.jsonl", ("{folder}/site4.jsonl", "rows/site2.jsonl")),
        ("rows/*.jsonl", "rows/*.jsonl"),
        ("7", "7"),
    ],
)
def test_paths_in_a_yaml_are_looked_for_beside_it(folder, value, resolved):
    loaded = load(written(folder, value))
    expected = resolved if isinstance(resolved, str) else tuple(resolved)
    assert loaded.config.data.path == (
        expected.format(folder=folder)
        if isinstance(expected, str)
        else tuple(text.format(folder=folder) for text in expected)
    )
    as_written = loaded.as_written.data.path
    assert (as_written if isinstance(as_written, str) else f"[{', '.join(as_written)}]") == value


def test_the_folder_of_the_command_does_not_change_the_fingerprint_of_a_list(folder, monkeypatch):
    path = written(folder, "[site4.jsonl, 'site1?.jsonl']")
    before = RunRequest(load(path))
    assert before.loaded.places["data.path"] == f"{folder}/site4.jsonl,{folder}/site1?.jsonl"
    monkeypatch.chdir(folder)
    again = RunRequest(load(path))
    assert again.fingerprint == before.fingerprint and again.record == before.record
    other = RunRequest(
        load(None, ["model.base=m", "data.task=file", 'data.path=[site4.jsonl,"site1?.jsonl"]'])
    )
    assert other.loaded.places == before.loaded.places
    assert other.fingerprint_as(json.loads(json.dumps(before.record))) == before.fingerprint


def test_a_path_is_text_or_a_list_of_texts():
    with pytest.raises(ConfigError, match=r"data.path is null, but must be .*text.*list"):
        load(None, ["data.path=null"])
    with pytest.raises(
        ConfigError, match="data.held_out=h.jsonl would not be read, because data.task=builtin"
    ):
        load(None, ["model.base=m", "data.held_out=h.jsonl"])
    with pytest.raises(ConfigError, match=r"give data.held_out"):
        load(None, ["model.base=m", "data.val_fraction=0", "federation.patience=2"])
    load(
        None,
        "model.base=m data.task=file data.path=a data.held_out=b data.val_fraction=0 "
        "federation.patience=2".split(),
    )
