"""Presets, tasks of the harness on local data with the fields of the published sets, and what is refused."""

import gzip
import json

import pytest

from fedspeed.data.eval_task import ALL
from fedspeed.errors import ConfigError, DataError, FedSpeedError
from fedspeed.evaluation import harness
from fedspeed.evaluation.config import EVAL_TASKS
from fedspeed.evaluation.harness import load_tasks
from fedspeed.evaluation.harness_results import HarnessSettings
from fedspeed.evaluation.presets import PRESETS, preset_of
from fedspeed.evaluation.results import harness_result_of

pytest.importorskip("lm_eval", reason="pip install -r requirements-eval.txt")

MMLU = {"question": "2 + 2?", "choices": ["3", "4", "5", "6"], "answer": 1, "subject": "x"}
NEWS = [
    {"sentence": f"Sales {verb}.", "label": label} for verb, label in (("fell", 0), ("rest", 1), ("rose", 2))
]
POSTS = [{"text": f"$ABC {verb}", "label": label} for verb, label in (("down", 0), ("up", 1), ("here", 2))]
OPINIONS = [
    {"sentence": f"ABC {verb}", "sentiment_score": score, "format": kind}
    for verb, score, kind in (("down", -0.4, "post"), ("here", 0.05, "headline"), ("up", 0.1, "post"))
]
MEDICAL = {
    "pubmedqa": {"QUESTION": "Does it help?", "CONTEXTS": ["It did.", "Often."], "final_decision": "no"},
    "medmcqa": {"question": "Which?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 2},
    "medqa_4options": {
        "sent1": "Which?",
        "ending0": "a",
        "ending1": "b",
        "ending2": "c",
        "ending3": "d",
        "label": 3,
    },
    "careqa_en": {"question": "Which?", "op1": "a", "op2": "b", "op3": "c", "op4": "d", "cop": 1},
}


def answering(answer):
    """Return a model of the harness that prefers the continuation `answer`, or generates what it returns for
    a prompt.
    """
    from lm_eval.api.model import LM

    class Answering(LM):
        def loglikelihood(self, requests):
            return [(-1.0 if request.args[1].strip() == answer else -2.0, False) for request in requests]

        def loglikelihood_rolling(self, requests):
            return [-float(len(request.args[0])) for request in requests]

        def generate_until(self, requests):
            return [answer(request.args[0]) for request in requests]

    return Answering()


def write(folder, name, records):
    (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(record) for record in records))


def results(names, settings, model):
    from fedspeed.evaluation.lm_eval_runs import run_tasks

    return {
        tasks.name: harness_result_of(run_tasks(model, tasks, settings), limit=settings.limit, seconds=1)
        for tasks in load_tasks(names, settings)
    }


def test_the_finance_board_on_local_data(tmp_path):
    for name, records in (("fpb", NEWS), ("tfns", POSTS), ("fiqa", OPINIONS)):
        write(tmp_path, f"flowertune_{name}", records)
    asked = []

    def said(prompt):
        asked.append(prompt)
        words = {
            "fell": "NEGATIVE? negative",
            "down": " Negative.",
            "rose": "Positive",
            "up": "so positive, not negative",
        }
        return next((text for word, text in words.items() if f" {word}" in prompt), "I do not know")

    names = PRESETS["flowertune_finance"].harness
    found = results(names, HarnessSettings(folders=(tmp_path,)), answering(said))
    assert {name: (one["score"], one["items"]) for name, one in found.items()} == {
        name: (1.0, 3) for name in names
    }
    assert all("unofficial" in one["settings"]["note"] for one in found.values())
    fpb = found["flowertune_fpb"]
    assert fpb["task"] == "lm_eval/flowertune_fpb" and list(fpb["data_sha256"]) == ["flowertune_fpb.jsonl"]
    question = "Please choose an answer from {negative/neutral/positive}."
    assert (
        asked[0]
        == f"Instruction: What is the sentiment of this news? {question}\nInput: Sales fell.\nAnswer: "
    )
    assert f"Instruction: What is the sentiment of this tweet? {question}\nInput: $ABC up\nAnswer: " in asked
    wrong = results(names[:1], HarnessSettings(folders=(tmp_path,)), answering(lambda prompt: "positive"))
    assert wrong["flowertune_fpb"]["score"] == pytest.approx(1 / 3)


@pytest.mark.slow
def test_the_general_and_the_medical_board_on_local_data(tmp_path):
    from fedspeed.evaluation.lm_eval_runs import single_tasks, task_manager

    general = PRESETS["flowertune_general"].harness
    medical = PRESETS["flowertune_medical"].harness
    manager = task_manager(general)
    subjects = {group: single_tasks(manager, group) for group in general}
    assert sum(map(len, subjects.values())) == 57 - 13  # the category "other" is not on the board
    group = "mmlu_social_sciences"  # the others have the same form
    for subject in subjects[group]:
        write(tmp_path, subject, [MMLU, MMLU | {"answer": 0}])
    for name, record in MEDICAL.items():
        write(tmp_path, name, [record])
    found = results([group, *medical], HarnessSettings(folders=(tmp_path,), num_fewshot=0), answering("B"))
    assert found[group]["score"] == 0.5 and found[group]["interval_95"] is not None
    assert found[group]["items"] == 2 * len(subjects[group]) == 2 * len(found[group]["by_category"])
    assert [found[name]["score"] for name in medical] == [0, 0, 0, 0]
    right = {"pubmedqa": "no", "medmcqa": "C", "medqa_4options": "D", "careqa_en": "A"}
    for name in medical:
        one = results([name], HarnessSettings(folders=(tmp_path,)), answering(right[name]))
        assert one[name]["score"] == 1


def test_presets_name_tasks_that_there_are():
    assert list(PRESETS) == [f"flowertune_{board}" for board in ("general", "finance", "medical", "code")]
    assert all(name in EVAL_TASKS for preset in PRESETS.values() for name in preset.tasks)
    assert all(EVAL_TASKS[name].runs_code for name in PRESETS["flowertune_code"].tasks)
    with pytest.raises(ConfigError, match="no such preset; did you mean flowertune_code"):
        preset_of("flowertune_cod")


def test_a_text_task_reports_perplexities(tmp_path):
    task = {
        "task": "texts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "texts.jsonl"}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "byte_perplexity"}],
    }
    (tmp_path / "texts.yaml").write_text(json.dumps(task))
    write(tmp_path, "texts", [{"text": "abc"}, {"text": "defgh"}])
    name = str(tmp_path / "texts.yaml")
    [one] = results([name], HarnessSettings(folders=(tmp_path,)), answering("")).values()
    assert one["metric"] == "byte_perplexity" and one["score"] == pytest.approx(2.718281828)
    assert one["interval_95"] is None and one["items"] == 2


def test_a_limit_chooses_the_same_items_as_ours(tmp_path):
    records = [json.dumps({"query": f"no {n}", "choices": ["a", "b"], "gold": 0}) for n in range(50)]
    (tmp_path / "qa_copa.jsonl.gz").write_bytes(gzip.compress("\n".join(records).encode()))
    from fedspeed.evaluation.item_choice import chosen_items
    from fedspeed.evaluation.lm_eval_runs import run_tasks

    settings = HarnessSettings(folders=(tmp_path,), limit=7)
    [tasks] = load_tasks(["fedspeed_copa"], settings)
    result = run_tasks(answering("a"), tasks, settings)
    assert [item.prompt for item in result.scores.items] == [f"no {n}" for n in chosen_items(50, 7)]
    assert result.scores.main[ALL].mean == 1


def test_what_is_refused(tmp_path, monkeypatch):
    settings = HarnessSettings(folders=(tmp_path,))
    with pytest.raises(DataError, match="evaluation task fedspeed_piqa: none of qa_piqa.jsonl.gz in"):
        load_tasks(["fedspeed_piqa"], settings)
    unsafe = tmp_path / "unsafe.yaml"
    unsafe.write_text(json.dumps({"task": "unsafe", "unsafe_code": True, "dataset_path": "json"}))
    with pytest.raises(
        FedSpeedError, match="executes generated code inside this process; choose a code task"
    ):
        load_tasks([str(unsafe)], settings)

    import lm_eval.api.task

    def unreachable(**_options):
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(lm_eval.api.task.datasets, "load_dataset", unreachable)
    with pytest.raises(
        DataError, match="flowertune_fpb .*cannot be loaded \\(ConnectionError: no network\\).*Hub"
    ):
        load_tasks(["flowertune_fpb"], settings)
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(FedSpeedError, match="not installed; pip install -r requirements-eval.txt"):
        load_tasks(["fedspeed_copa"], settings)
