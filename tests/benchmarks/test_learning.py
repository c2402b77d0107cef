"""benchmarks/learning.py: which runs it makes, and its page from results."""

import json
import subprocess

from benchmarks import learning_scores
from benchmarks.learning import loaded_config, runs_of
from benchmarks.learning_report import losses_of, mean_loss, write_report


def test_each_client_alone_and_all_rows_take_the_steps_of_the_federation(tmp_path):
    config = loaded_config("dolly", [])
    federated, *alone, centralised = runs_of("dolly", config, tmp_path)
    assert federated.overrides == () and len(alone) == 8
    assert f"data.path={tmp_path}/train-client-7.jsonl" in alone[7].overrides
    assert all("federation.server_optimizer=none" in run.overrides for run in (*alone, centralised))
    assert not any(text.startswith("train.") for run in alone for text in run.overrides)
    assert not any("local_steps" in text or "rounds" in text for run in alone for text in run.overrides)
    assert "train.accumulation=8" in centralised.overrides
    assert all(f"{tmp_path}/train-client-{i}.jsonl" in " ".join(centralised.overrides) for i in range(8))
    assert [run.name for run in runs_of("gsm8k", loaded_config("gsm8k", []), tmp_path)][-2:] == [
        "centralised",
        "centralised-short-steps",
    ]


def test_the_page_keeps_its_remarks(tmp_path):
    table = [
        {"client": client, "category": "", "loss": 10.0 * client + 10, "tokens": 10, "rows": 1}
        for client in range(2)
    ]
    folder = tmp_path / "out" / "gsm8k" / "held-out"
    folder.mkdir(parents=True)
    models = ("base", "federated", "client-2", "client-10", "centralised", "centralised-short-steps")
    for model in reversed(models):
        (folder / f"{model}.json").write_text(json.dumps(table))
    assert tuple(losses_of(tmp_path / "out" / "gsm8k")) == models
    assert mean_loss(table) == 1.5
    results = tmp_path / "results"
    results.mkdir()
    (results / "learning.md").write_text("old\n## Remarks\n\nkept\n")
    write_report(tmp_path / "out", results)
    page = (results / "learning.md").read_text()
    assert "| base | 1.5000 | 1.000 | 2.000 |" in page and page.endswith("## Remarks\n\nkept\n")
    later = tmp_path / "later"
    (later / "dolly").mkdir(parents=True)
    (folder.rename(later / "dolly" / "held-out"))
    write_report(later, results)
    both = (results / "learning.md").read_text()
    assert "## gsm8k" in both and "## dolly" in both and both.count("| base | 1.5000 |") == 2
    assert "old" not in page and (results / "learning-gsm8k.png").read_bytes()[:4] == b"\x89PNG"


def test_scores_that_are_there_are_not_made_again(tmp_path, monkeypatch):
    scores = tmp_path / "scores"
    scores.mkdir()
    for name, tasks in {"base": ["gsm8k_zero_shot", "gsm8k"], "federated": ["gsm8k_zero_shot"]}.items():
        results = {"results": [{"task": task} for task in tasks]}
        (scores / f"200-{name}.json").write_text(json.dumps(results))
    made = []

    def run(command, **options):
        made.append(command[command.index("eval") + 1 :])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(learning_scores.subprocess, "run", run)
    learning_scores.score("gsm8k", "the base", tmp_path, ("model.dtype=bf16",))
    targets = [(arguments[0], arguments[arguments.index("--out") + 1]) for arguments in made]
    assert targets == [
        (str(tmp_path / "federated"), str(scores / "200-federated.json")),
        (str(tmp_path / "centralised"), str(scores / "200-centralised.json")),
        ("the base", str(scores / "all-base.json")),
        (str(tmp_path / "federated"), str(scores / "all-federated.json")),
    ]
    assert ["--limit" in arguments for arguments in made] == [True, True, False, False]
