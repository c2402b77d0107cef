"""`fedspeed eval compare`: a table and a plot of results that were written before."""

import json

import pytest

from fedspeed.cli import main
from fedspeed.evaluation.compare_runs import comparison_figure, comparison_text, read_model


def result(task, score, items=200, **more):
    return {
        "task": task,
        "metric": "accuracy",
        "score": score,
        "interval_95": [score - 0.05, score + 0.05],
        "items": items,
        "by_category": {},
        "prompts_sha256": "a",
        "data_sha256": {"test.jsonl": "b"},
        **more,
    }


def write(folder, *results):
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps({"target": {}, "results": results}))
    return str(folder)


def category(score):
    return {"score": score, "interval_95": None, "items": 5}


@pytest.fixture
def runs(tmp_path):
    """Return the folders of a base and a federated run; only the latter has a loss by category."""
    loss = result(
        "held_out", 0.97, items=96, metric="loss", by_category={"C": category(0.9), "Go": category(1.04)}
    )
    base = write(tmp_path / "base", result("gsm8k", 0.015))
    return base, write(tmp_path / "federated", result("gsm8k", 0.185), loss)


def test_models_by_tasks_with_intervals_and_categories(runs, capsys, tmp_path):
    assert main(["eval", "compare", *runs, "--plot", str(tmp_path / "scores.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert cells[0] == ["model", "gsm8k (accuracy)", "held_out (loss)"]
    assert cells[2] == ["base", "1.50 % [-3.50 to 6.50 %] of 200", "-"]
    assert cells[3] == ["federated", "18.50 % [13.50 to 23.50 %] of 200", "0.9700 [0.9200 to 1.0200] of 96"]
    assert cells[4] == ["held_out (loss)", "C", "Go"]
    assert cells[6:] == [["federated", "0.9000 of 5", "1.0400 of 5"]]
    assert not [line for line in lines if line.startswith("note")]
    assert (tmp_path / "scores.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_said_of_a_model_is_a_note(runs, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    values = {"target": {"note": "only what clients have in common"}, "results": [result("gsm8k", 0.1)]}
    (folder / "evaluation.json").write_text(json.dumps(values))
    lines = comparison_text([*map(read_model, runs), read_model(str(folder))]).splitlines()
    assert lines[-1] == "note: only what clients have in common"


def test_axes_and_labels_of_the_plot_have_the_same_unit(runs):
    shares, losses = comparison_figure([read_model(run) for run in runs]).axes
    shares.figure.draw_without_rendering()
    assert all(label.get_text().endswith(" %") for label in shares.get_xticklabels())
    assert [text.get_text() for text in shares.texts] == ["1.50 %", "18.50 %"]
    assert not [label for label in losses.get_xticklabels() if "%" in label.get_text()]


@pytest.mark.parametrize(
    "changed, what",
    [
        ({"prompts_sha256": "z"}, "prompts"),
        ({"data_sha256": {}}, "data"),
        ({"items": 20}, "items"),
        ({"settings": {"temperature": 0.8}}, "settings of the generation"),
    ],
)
def test_scores_on_other_items_are_noted(runs, tmp_path, changed, what):
    other = write(tmp_path / "other", result("gsm8k", 0.2) | changed)
    text = comparison_text([read_model(runs[0]), read_model(other)])
    assert f"note: gsm8k: other had other {what} than base" in text


def test_scores_among_the_settings_are_no_difference(tmp_path):
    results = [
        result("lm_eval/x", score, settings={"harness_results": {"acc": score}}) for score in (0.1, 0.2)
    ]
    models = [read_model(write(tmp_path / name, one)) for name, one in zip("ab", results)]
    assert "note" not in comparison_text(models)


def test_a_run_that_was_not_evaluated_is_refused_with_the_command(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert main(["eval", "compare", str(tmp_path / "run")]) == 2
    assert f"fedspeed eval {tmp_path / 'run'}" in capsys.readouterr().err
    assert main(["eval", "compare"]) == 2


def test_a_file_of_results_can_be_named(runs, tmp_path, monkeypatch):
    assert read_model(f"{runs[0]}/evaluation.json").name == "base"
    monkeypatch.chdir(runs[0])
    assert read_model("evaluation.json").name == "base"
    (tmp_path / "eight-shot.json").write_text(json.dumps({"results": [result("gsm8k", 0.1)]}))
    assert read_model(str(tmp_path / "eight-shot.json")).name == "eight-shot"
