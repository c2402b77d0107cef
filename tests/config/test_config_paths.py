"""Relative paths in a configuration: relative to the YAML file first, then to the working folder."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedspeed.checkpoint.journal import Entry, Journal
from fedspeed.config.deepspeed import merge
from fedspeed.config.load import FIELDS, load
from fedspeed.errors import FedSpeedError, JournalError
from fedspeed.federation.methods.config import METHODS
from fedspeed.session.preflight import check
from fedspeed.session.request import RunRequest
from fedspeed.session.resume import journal_entry

KEYS = [key for key, field in FIELDS.items() if field.path is not None]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Return a working folder; its folder `conf` holds a YAML file and the files that the YAML file names."""
    conf = tmp_path / "conf"
    for folder in (conf / "base", tmp_path / "base", tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
    (conf / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def value(loaded, key: str) -> str:
    section, _, name = key.partition(".")
    return getattr(getattr(loaded.config, section), name)


def test_every_key_that_names_something_to_read_is_known():
    assert KEYS == [
        "model.base",
        "model.tokenizer",
        "adapter.start_from",
        "data.path",
        "data.held_out",
        "data.chat_template",
        "federation.public_rows",
        "cluster.probe",
        "routing.identity",
        "routing.roster",
        "routing.roster_signer",
    ]


@pytest.mark.parametrize("key", KEYS)
def test_a_path_in_a_yaml_is_beside_it(project, key, monkeypatch):
    if key == "federation.public_rows":  # a method whose server reads some
        monkeypatch.setitem(METHODS, "lora_average", replace(METHODS["lora_average"], public_rows=True))
    section, _, name = key.partition(".")
    text = f"{section}:\n  {name}: base\n" + (
        "" if section == "model" and name == "base" else "model:\n  base: m\n"
    )
    if key == "model.tokenizer":
        text = "model:\n  base: m\n  tokenizer: base\n"
    extra = {
        "data.path": ["data.task=file"],
        "data.held_out": ["data.task=file", "data.path=rows.jsonl"],
        "data.chat_template": ["data.template=chat"],
    }.get(key, [])
    loaded = load(write(project / "conf", text), extra)
    assert value(loaded, key) == str(project / "conf" / "base")
    assert loaded.written == {key: "base"} and loaded.places[key] == str(project / "conf" / "base")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("elsewhere", "elsewhere"),  # not beside the YAML: in the folder of the command, as it was written
        ("../elsewhere", "{project}/elsewhere"),
        ("{project}/conf/base", "{project}/conf/base"),
        ("org/model", "org/model"),  # nowhere: a hub name
        ("./base", "{project}/conf/base"),
        ("base/", "{project}/conf/base"),
    ],
)
def test_where_a_base_is_looked_for(project, written, meant):
    loaded = load(write(project / "conf", f"model:\n  base: {written.format(project=project)}\n"))
    assert loaded.config.model.base == meant.format(project=project)
    assert loaded.as_written.model.base == written.format(project=project)


def test_words_and_empty_texts_are_no_paths(project):
    for name in ("auto", "bytes"):
        (project / "conf" / name).mkdir()
    path = write(project / "conf", "model:\n  base: m\n  tokenizer: bytes\nadapter:\n  start_from: ''\n")
    assert (load(path).config.model.tokenizer, load(path).config.adapter.start_from, load(path).written) == (
        "bytes",
        "",
        {},
    )


def test_on_the_command_line_a_path_is_relative_to_the_command(project):
    path = write(project / "conf", "model:\n  base: base\n")
    assert load(path, ["model.base=base"]).config.model.base == "base"
    assert load(path, ["data.task=file", "data.path=rows.jsonl"]).config.data.path == "rows.jsonl"


def test_a_home_folder_is_a_home_folder(project, monkeypatch):
    monkeypatch.setenv("HOME", str(project))
    assert load(write(project / "conf", "model:\n  base: ~/base\n")).config.model.base == str(
        project / "base"
    )
    assert load(None, ["model.base=~/base"]).config.model.base == str(project / "base")


def test_a_name_that_no_file_can_have_stays_as_it_is(project):
    for name in ("x" * 5000, "~nobody-of-this-name/base"):
        assert load(write(project / "conf", f"model:\n  base: {name}\n")).config.model.base == name


def test_who_names_an_input_that_is_nowhere_is_reported_where_it_was_looked_for(project):
    path = write(project / "conf", "model:\n  base: ./nowhere\n")
    assert load(path).searched("model.base") == f" (looked for in {project / 'conf'} and {project})"
    assert load(path, ["model.base=x"]).searched("model.base") == f" (looked for in {project})"
    assert load(path, ["model.base=/x"]).searched("model.base") == ""
    with pytest.raises(
        FedSpeedError, match=r"\./nowhere does not exist \(looked for in .*conf and .*\); give a folder"
    ):
        check(load(path), None)


def test_outputs_stay_relative_to_the_command(project):
    (project / "conf" / "runs").mkdir()
    assert load(write(project / "conf", "model:\n  base: base\nrun:\n  out: runs\n")).run_folder == Path(
        "runs/run"
    )


def test_a_base_file_of_deepspeed_follows_the_same_rule(project):
    for folder, stage in ((project, 1), (project / "conf", 2)):
        (folder / "ds.json").write_text(f'{{"zero_optimization": {{"stage": {stage}}}}}')
    path = write(project / "conf", "model:\n  base: m\ndeepspeed:\n  base: ds.json\n")
    for words, stage in (([], 2), (["deepspeed.base=ds.json"], 1)):
        loaded = load(path, words)
        assert (
            merge(loaded.config.deepspeed, loaded.config, loaded.folder)["zero_optimization"]["stage"]
            == stage
        )


@pytest.mark.parametrize("text", ["base", "../elsewhere", "org/model"])
def test_the_folder_of_the_command_does_not_change_the_fingerprint(project, monkeypatch, text):
    path = write(project / "conf", f"model:\n  base: {text}\n")
    here = RunRequest(load(path)).fingerprint
    record = RunRequest(load(path)).record
    for folder in (project / "elsewhere", project / "conf"):
        monkeypatch.chdir(folder)
        again = RunRequest(load(Path(os.path.relpath(path))))
        assert again.fingerprint == here and again.record == record


def test_a_run_goes_on_with_the_same_input_spelled_in_another_way_and_not_with_another(project, monkeypatch):
    path = write(project / "conf", "model:\n  base: m\n")
    first = RunRequest(load(path, ["model.base=conf/base"]))
    journal = Journal(project / "kept", 2)
    before = Journal(project / "from before there were places", 2)
    tensors = {"global/w": np.zeros(2, np.float32)}
    journal.commit(Entry(1, first.fingerprint, 0, first.record), tensors)
    before.commit(
        Entry(
            1, first.fingerprint, 0, {key: value for key, value in first.record.items() if key != "places"}
        ),
        tensors,
    )
    assert journal_entry(before, first).round == 1
    monkeypatch.chdir(project / "elsewhere")
    for text in ("../conf/base", str(project / "conf" / "base")):
        again = RunRequest(load(path, [f"model.base={text}"]))
        assert again.fingerprint != first.fingerprint and journal_entry(journal, again).round == 1
    with pytest.raises(JournalError, match="model.base: 'conf/base' -> '../base'"):
        journal_entry(journal, RunRequest(load(path, ["model.base=../base"])))


def test_an_adapter_names_a_base_that_is_found_from_anywhere(project):
    from fedspeed.checkpoint.export import lasting_name

    (project / "base" / "config.json").write_text("{}")
    for text in ("base", "base/config.json", "elsewhere/../base", str(project / "base")):
        assert lasting_name(text) == str(project / "base")
    assert lasting_name("org/model") == "org/model"
