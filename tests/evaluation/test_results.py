"""The file of results: what it keeps, and what it makes room for."""

import json
import math

import pytest

from fedspeed.data.eval_task import ALL, LossTask, Tally
from fedspeed.errors import DataError
from fedspeed.evaluation.results import add_results, read_results, result_of, write_answers
from fedspeed.evaluation.scoring import ScoredItem, TaskScores

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


class Loss(LossTask):
    """A task of one row."""

    name = "loss"

    def items(self, limit=0):
        raise AssertionError


def test_a_loss_that_is_no_number_is_null(tmp_path):
    """As of a run that has diverged."""
    scores = {ALL: Tally.of_sum(math.nan, 3.0) + Tally.of_sum(1.0, 2.0)}
    item = ScoredItem("prompt", "", ("answer",), {"loss": Tally.of_sum(math.nan, 3.0)})
    one = result_of(Loss(), TaskScores({"loss": scores, "exact": {}}, [item]), limit=0, seconds=1.0)
    assert (one["score"], one["interval_95"], one["items"]) == (None, None, 2)
    add_results(tmp_path / "evaluation.json", BASE, [one])
    write_answers(tmp_path / "answers", [("loss", [item])])
    for name in ("evaluation.json", "answers"):
        assert "NaN" not in (tmp_path / name).read_text()


@pytest.mark.parametrize("content", ["[]", '{"results": [1]}', '{"results": [{}]}', "{"])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "evaluation.json"
    path.write_text(content)
    with pytest.raises(DataError, match="evaluation.json: .*move it away"):
        read_results(path)
