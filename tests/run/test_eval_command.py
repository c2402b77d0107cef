"""`fedspeed eval`: what it evaluates, on how many ranks and which tier, and what it refuses."""

import gzip
import hashlib
import json

import pytest

from fedspeed.cli import main
from fedspeed.models.file_digests import weights_digest
from tests.run.launched import EVAL, records

DRAWN = "model.init=random"
ROWS = [
    {"instruction": "copy", "input": "dabe", "output": "dabe", "category": "copy"},
    {"instruction": "reverse", "input": "ab", "output": "ba", "category": "reverse"},
    {"instruction": "double", "input": "ab", "output": "aabb", "category": "double"},
]


def evaluate(workshop, *arguments):
    """Return the results of a command that must succeed."""
    ended = workshop.run(*arguments, "--json", command=EVAL)
    assert ended.code == 0, ended.text
    lines = [json.loads(line) for line in ended.out.splitlines()]
    assert all(line.pop("event") == "evaluation" for line in lines)
    return lines


@pytest.fixture(scope="module")
def of_run(shared_workshop, whole):
    """The results of a run on two ranks."""
    _, run = whole
    options = "--tasks", "held_out,exact_match", "--save-answers", str(run / "answers")
    return evaluate(shared_workshop, str(run), *options, "cluster.local_ranks=2")


def test_a_run_is_evaluated_as_its_own_rounds_were(of_run, whole):
    loss, match = of_run
    best = min(records(whole[1]), key=lambda record: record["val_loss"])
    assert loss["score"] == pytest.approx(best["val_loss"], rel=1e-4)
    assert loss["metrics"]["exact"]["score"] == pytest.approx(best["val_exact"])
    assert len(loss["by_category"]) == 6
    parts = loss["by_category"].values()
    assert sum(part["items"] for part in parts) == loss["items"] == match["items"]
    low, high = loss["interval_95"]
    assert low < loss["score"] < high and match["settings"]["max_new"] == 256
    assert loss["data_sha256"] == match["data_sha256"] and len(loss["data_sha256"]["held-out rows"]) == 64
    assert set(loss["versions"]) >= {"fedspeed", "torch", "transformers"}


def test_results_and_answers_are_kept(of_run, whole):
    _, run = whole
    kept = json.loads((run / "evaluation.json").read_text())
    results = [{key: value for key, value in line.items() if key != "target"} for line in of_run]
    assert kept["results"] == results and kept["target"] == of_run[0]["target"]
    assert kept["target"]["weights"] == weights_digest(run / "adapter") != ""
    assert "## Evaluation of the exported model" in (run / "report.md").read_text()
    answers = [json.loads(line) for line in (run / "answers").read_text().splitlines()]
    assert [answer["task"] for answer in answers].count("exact_match") == of_run[1]["items"]
    of_match = [answer for answer in answers if answer["task"] == "exact_match"]
    of_loss = [answer for answer in answers if answer["task"] == "held_out"]
    assert all("answers" in answer and "expected" not in answer for answer in of_match)
    assert of_loss and all("expected" in answer and "answers" not in answer for answer in of_loss)
    assert sum(a["scores"]["accuracy"] for a in of_match) / len(of_match) == of_run[1]["score"]


def test_a_streamed_base_scores_the_same_on_one_rank(shared_workshop, of_run, whole):
    _, run = whole
    # The folder of the results may hold a report that is not this run's.
    (shared_workshop.folder / "report.md").write_text("mine")
    out = "--out", str(shared_workshop.folder / "streamed.json")
    [loss] = evaluate(shared_workshop, str(run), *out, "engine.tier=ram", "cluster.local_ranks=1")
    assert (shared_workshop.folder / "report.md").read_text() == "mine"
    assert loss["score"] == pytest.approx(of_run[0]["score"], rel=1e-5)
    assert loss["prompts_sha256"] == of_run[0]["prompts_sha256"]


def test_a_base_is_evaluated_on_a_file_of_rows(shared_workshop):
    path = shared_workshop.folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    out = shared_workshop.folder / "base.json"
    options = "--held-out", str(path), "--out", str(out), DRAWN, "model.tokenizer=bytes"
    base = str(shared_workshop.folder / "model")
    [loss] = evaluate(shared_workshop, base, *options)
    assert loss["target"]["kind"] == "base" and loss["target"]["template"] == "alpaca"
    assert loss["items"] == 3 and set(loss["by_category"]) == {"copy", "reverse", "double"}
    assert loss["data_sha256"] == {"rows.jsonl": hashlib.sha256(path.read_bytes()).hexdigest()}
    # A task that is evaluated again replaces its result, and another one is added.
    tasks = "--tasks", "held_out,answer_choice", "--limit", "2"
    [limited, _] = evaluate(shared_workshop, base, *options, *tasks)
    kept = json.loads(out.read_text())["results"]
    assert [(one["task"], one["items"]) for one in kept] == [("held_out", 2), ("answer_choice", 2)]
    assert kept[0]["score"] == limited["score"] != loss["score"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "nowhere: there is no such folder and no such run"),
        (("{model}",), "has no held-out rows of its own, so that a task must be named: --tasks"),
        (
            ("{model}", DRAWN, "--tasks", "held_out"),
            "a base has no held-out rows of its own; name a file of rows",
        ),
        (("{model}", DRAWN, "--tasks", "gms8k"), "'gms8k' is no evaluation task; did you mean gsm8k"),
        (
            ("{model}", DRAWN, "--held-out", "none.jsonl"),
            "none.jsonl: cannot be read (No such file or directory)",
        ),
        (("{run}", "--tasks", "held_out,held_out"), "--tasks: held_out is named twice"),
        (("{run}", "federation.rounds=3"), "federation.rounds=3: an evaluation has one model and no rounds"),
        (("{run}", "--out", "{model}"), "{model}: cannot be written"),
        (("{model}", "--held-out", "rows"), "no model.safetensors and no model.safetensors.index.json"),
        ((), "TARGET is missing"),
        (("{model}", DRAWN, "data.template=plain"), "has no held-out rows of its own"),
        (
            ("{model}", "--chat-template", "--plot", "x.png"),
            "--plot belongs to `eval compare`, --chat-template",
        ),
    ],
)
def test_what_is_wrong_is_refused_before_anything_starts(shared_workshop, whole, capsys, arguments, said):
    names = {"model": str(shared_workshop.folder / "model"), "run": str(whole[1])}
    code = main(["eval", *(argument.format(**names) for argument in arguments)])
    assert code == 2 and said.format(**names) in capsys.readouterr().err


def test_tasks_of_the_harness_and_their_items(shared_workshop, monkeypatch):
    pytest.importorskip("lm_eval", reason="pip install -r requirements-eval.txt")
    folder = shared_workshop.folder / "questions"
    folder.mkdir()
    questions = [{"query": f"no {n}", "choices": ["a", "b"], "gold": n % 2} for n in range(5)]
    (folder / "qa_copa.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, questions)).encode()))
    news = [{"sentence": "Sales fell.", "label": 0}, {"sentence": "Sales rest.", "label": 1}]
    for name in ("fpb", "tfns", "fiqa"):
        extra = {"text": "up", "sentiment_score": 0.0, "format": "post"}
        text = "\n".join(json.dumps(record | extra) for record in news)
        (folder / f"flowertune_{name}.jsonl").write_text(text)
    monkeypatch.setenv("FEDSPEED_DATA", str(folder))
    base = str(shared_workshop.folder / "model")
    options = DRAWN, "model.tokenizer=bytes", "--out", str(shared_workshop.folder / "harness.json")
    asked = "--tasks", "copa", "--lm-eval", "fedspeed_copa", "--preset", "flowertune_finance"
    engine = "engine.tier=ram", "cluster.local_ranks=2"
    results = evaluate(shared_workshop, base, *options, *asked, *engine)
    ours, theirs, *finance = results
    assert (ours["task"], theirs["task"]) == ("copa", "lm_eval/fedspeed_copa")
    assert ours["score"] == theirs["score"] and ours["prompts_sha256"] == theirs["prompts_sha256"]
    assert ours["data_sha256"] == theirs["data_sha256"] and "not comparable" in theirs["settings"]["note"]
    assert [one["preset"] for one in finance] == ["flowertune_finance"] * 3
    assert all("unofficial" in one["note"] and one["items"] == 2 for one in finance)
