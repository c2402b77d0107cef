"""`fedspeed chat`: which folder it loads, and its messages if there is none. Answers are tested in
tests/checkpoint/test_export.py.
"""

import io
import json

import numpy as np
import pytest

from fedspeed.checkpoint.journal import Entry, Journal
from fedspeed.cli import main
from fedspeed.session.chat import exported_folder

CARD = "---\nfedspeed:\n  template: plain\n  dtype: float32\n---\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Return a folder with a finished run, a run that exported a model, an unfinished run, and a folder that
    is no run.
    """
    for run, kind, file in (("done", "adapter", "adapter_config.json"), ("whole", "model", "config.json")):
        folder = tmp_path / "runs" / run / kind
        folder.mkdir(parents=True)
        (folder / file).write_text("{}")
    Journal(tmp_path / "runs" / "going", 1).commit(Entry(3, "", 0, {}), {"global/w": np.zeros(1, np.float32)})
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("done", "runs/done/adapter"),
        ("runs/done", "runs/done/adapter"),
        ("runs/done/adapter", "runs/done/adapter"),
        ("whole", "runs/whole/model"),
        ("{project}/runs/whole/", "{project}/runs/whole/model"),
    ],
)
def test_a_run_is_found_by_its_name_or_folder(project, name, folder):
    assert str(exported_folder(name.format(project=project))) == folder.format(project=project)


def refused(arguments, capsys) -> str:
    assert main(["chat", *arguments]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing", "hello"], "nothing: there is no such folder and no such run; runs/ holds going"),
        (
            ["going", "hello"],
            "runs/going: the run has not finished (its journal ends with round 3), so that nothing is "
            "exported yet; the command that",
        ),
        (
            ["other", "hello"],
            "other: holds no adapter/, no model/ and no journal of a run; name the folder of a finished run",
        ),
        (
            ["done", "hello"],
            "runs/done/adapter/README.md: no such file, but it names the prompt that the weights were "
            "trained with",
        ),
    ],
)
def test_what_cannot_be_asked_is_reported(project, capsys, arguments, said):
    assert said in refused(arguments, capsys)


@pytest.mark.parametrize(
    ("card", "config", "said"),
    [
        ("# mine\n", {}, "README.md: does not name the prompt that the weights were trained with"),
        ("---\nfedspeed: 3\n---\n", {}, "README.md: does not name the prompt"),
        (CARD.replace("float32", "load"), {}, "README.md: dtype 'load' is no type of torch"),
        (CARD, {}, "adapter_config.json: does not name its base in base_model_name_or_path"),
        (
            CARD,
            {"base_model_name_or_path": "{project}/gone"},
            "its base {project}/gone is not there; bring it back",
        ),
        (
            CARD,
            {"base_model_name_or_path": "{project}/other"},
            "its base {project}/other holds no weights, as with model.init=random",
        ),
    ],
)
def test_an_export_that_is_not_whole_is_reported(project, capsys, card, config, said):
    folder = project / "runs" / "done" / "adapter"
    (folder / "README.md").write_text(card)
    (folder / "adapter_config.json").write_text(
        json.dumps({key: value.format(project=project) for key, value in config.items()})
    )
    assert said.format(project=project) in refused(["done", "hello"], capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["done", "x", "--max-new-tokens", "0"], "is not a whole number of at least 1"),
        (["done", "x", "--temperature", "-1"], "is not a number of at least 0"),
        (["done", "x", "--temperature", "hot"], "is not a number of at least 0"),
    ],
)
def test_bad_arguments_are_refused(project, capsys, arguments, said):
    with pytest.raises(SystemExit, match="2"):
        main(["chat", *arguments])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("text", "lines"), [("  ", ""), (None, "\n \n"), (None, "")])
def test_nothing_to_answer_is_reported(project, capsys, monkeypatch, text, lines):
    monkeypatch.setattr("fedspeed.session.chat.load", lambda folder: None)
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert "there is nothing to answer" in refused(["done", *([text] if text is not None else [])], capsys)
