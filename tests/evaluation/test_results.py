"""The file of results: what it keeps, and what it makes room for."""

import json

from fedspeed.evaluation.results import add_results

BASE = {"name": "base", "weights": "a1"}


def result(task, score=0.5):
    return {"task": task, "score": score}


def tasks_in(path):
    return [(one["task"], one["score"]) for one in json.loads(path.read_text())["results"]]


def test_results_of_other_weights_are_kept_under_another_name(tmp_path):
    path = tmp_path / "evaluation.json"
    add_results(path, BASE, [result("gsm8k"), result("qa")])
    add_results(path, BASE, [result("qa", 0.75)])
    assert tasks_in(path) == [("gsm8k", 0.5), ("qa", 0.75)]
    add_results(path, BASE | {"weights": "b2"}, [result("qa", 1.0)])
    add_results(path, {"name": "other"}, [result("copa")])
    assert tasks_in(path) == [("copa", 0.5)]
    assert tasks_in(tmp_path / "evaluation-1.json") == [("gsm8k", 0.5), ("qa", 0.75)]
    assert tasks_in(tmp_path / "evaluation-2.json") == [("qa", 1.0)]
