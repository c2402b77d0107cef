"""The scores in a run's report, of which the last evaluation counts."""

from fedspeed.evaluation.report_section import update_report


def result(score):
    values = {"score": score, "interval_95": [0.1, 0.9], "items": 4}
    return {"task": "gsm8k", "metric": "accuracy", "metrics": {"accuracy": values}, "settings": {}}


def test_scores_replace_those_of_an_earlier_evaluation(tmp_path):
    report = tmp_path / "report.md"
    update_report(report, [result(0.5)])
    assert not report.exists()
    report.write_text("# Run\n\n## Rounds\n\ntext\n")
    update_report(report, [result(0.5)])
    update_report(report, [result(0.75)])
    text = report.read_text()
    assert text.startswith("# Run\n\n## Rounds\n\ntext\n\n## Evaluation of the exported model\n")
    assert text.count("## Evaluation") == 1
    assert "| gsm8k | accuracy | 75.00 % | 10.00 to 90.00 % | 4 |" in text and "50.00 %" not in text
