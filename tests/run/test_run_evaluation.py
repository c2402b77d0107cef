"""Evaluation tasks while a run goes on: their scores in all outputs, in a masked mode, and after a resume."""

import json

import pytest

from tests.run.launched import records, with_overrides

TASKS = ("held_out", "answer_choice")
ARGUMENTS = (
    "routing.mode=mix+mask",
    "cluster.local_ranks=3",
    "federation.local_optimizer=reset",
    f"evaluation.tasks=[{', '.join(TASKS)}]",
    "evaluation.every=3",
    "evaluation.limit=0",
    "data.val_fraction=0.2",
)


@pytest.fixture(scope="module")
def run(shared_workshop):
    """The folder of a masked run with evaluation tasks, on three ranks."""
    shared_workshop.finish_run(*ARGUMENTS, "run.name=tasks")
    return shared_workshop.runs / "tasks"


def test_the_ranks_shares_are_all_items_of_the_common_model(run):
    """The loss of the task is that of the rounds' own evaluation, which goes over the same rows."""
    rounds = records(run)
    scored = [record for record in rounds if "eval_held_out" in record]
    # Before round 1, every third round, and after the last one.
    assert [record["round"] for record in scored] == [0, 3, 4]
    for record in scored:
        assert record["eval_held_out"] == pytest.approx(record["val_loss"], rel=1e-5)
        assert 0 <= record["eval_answer_choice"] <= 1
    assert not any(name.startswith("eval_") for name in rounds[1])


def test_every_output_has_the_scores(run):
    last = records(run)[-1]
    summary = json.loads((run / "summary.json").read_text())
    report = (run / "report.md").read_text()
    assert summary["eval_held_out"] == last["eval_held_out"] and "eval_gsm8k" not in summary
    assert f"| evaluation of held_out: loss, last | {last['eval_held_out']:.4f} |" in report
    assert " eval: held_out loss | eval: answer_choice accuracy |" in report and "gsm8k" not in report
    [events] = (run / "tensorboard").glob("events.*")
    content = events.read_bytes()
    assert b"eval/held_out" in content and b"eval/answer_choice" in content and b"eval/gsm8k" not in content


def test_a_resumed_run_has_the_scores_of_one_that_was_not_interrupted(shared_workshop, run):
    plain = with_overrides(ARGUMENTS, "routing.mode=plain")
    shared_workshop.finish_run(*plain, "run.name=resumed", "federation.rounds=2")
    shared_workshop.finish_run(*plain, "run.name=resumed")
    shared_workshop.finish_run(*plain, "run.name=unmasked")
    whole, resumed = (records(shared_workshop.runs / name) for name in ("unmasked", "resumed"))
    for name in map("eval_{}".format, TASKS):
        for one, again, masked in zip(whole, resumed, records(run), strict=True):
            if one["round"] != 2:  # the last round of the first start, which is scored for that
                assert one.get(name) == again.get(name)
            if name in masked:
                assert one[name] == pytest.approx(masked[name], rel=1e-6)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("evaluation.tasks=[gms8k]", "'gms8k' is no evaluation task; did you mean gsm8k"),
        ("evaluation.tasks=[held_out, held_out]", "evaluation.tasks: held_out is named twice"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_start(shared_workshop, override, said):
    ended = shared_workshop.run(*with_overrides(ARGUMENTS, override, "run.name=refused"))
    assert ended.code == 2 and said in ended.err
    assert not (shared_workshop.runs / "refused").exists()
