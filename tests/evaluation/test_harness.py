"""Tasks of lm-evaluation-harness on our engines, on local data."""

import gzip
import json
from pathlib import Path

import pytest

from fedspeed.data.eval_task import ALL
from fedspeed.data.sources import data_folders
from fedspeed.evaluation.config import QA_SETS
from fedspeed.evaluation.context import TaskContext, entry_of, make_task
from fedspeed.evaluation.harness import load_tasks
from fedspeed.evaluation.harness_results import HarnessSettings
from fedspeed.models.config import ModelConfig
from fedspeed.models.local_config import has_tokenizer
from fedspeed.models.tokenizer import byte_tokenizer, load_tokenizer
from tests.evaluation.harness_models import engine_lm, hf_lm
from tests.evaluation.published_data import published_task
from tests.processes import run_clusters
from tests.smollm2 import smollm2
from tests.tiny import write_llama

pytest.importorskip("lm_eval", reason="pip install -r requirements-eval.txt")

QUESTIONS = [
    {"query": "Question: What shines?\n", "choices": ["sun", "stone", "mud", "ice"], "gold": 0},
    {"query": "Question: What melts?\n", "choices": ["a rock", "ice", "sand", "the wind"], "gold": 1},
    {"query": "Question: What blows?\n", "choices": ["wood", "water", "milk", "wind"], "gold": 3},
]
CAUSES = [{"query": "It rained, therefore", "choices": ["streets got wet.", "dogs flew."], "gold": 0}] * 3
PRONOUNS = [
    {
        "context_options": ["Ann helped Eve so Ann", "Ann helped Eve so Eve"],
        "continuation": continuation,
        "gold": gold,
    }
    for continuation, gold in (("was thanked.", 0), ("thanked her.", 1), ("was glad.", 1))
]
RECORDS = {"winogrande": PRONOUNS, "copa": CAUSES}


def write_questions(folder):
    folder.mkdir(exist_ok=True)
    for name in QA_SETS:
        lines = [json.dumps(record) for record in RECORDS.get(name, QUESTIONS)]
        (folder / f"qa_{name}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder


def summary(results):
    """Return by name what can be compared of results."""
    return {
        result.name: {
            "scores": {
                metric: {category: tally.mean for category, tally in scores.items()}
                for metric, scores in result.scores.metrics.items()
            },
            "logprobs": [value for item in result.scores.items for value in item.logprobs],
            "details": dict(result.details),
        }
        for result in results
    }


def with_both(rank, base, names, settings, *, kinds=("resident", "ram"), own=None):
    """Return the results of tasks over engines and over the harness's own model, and those of a task of
    ours.
    """
    from fedspeed.engine.world import join_world, leave_world, quiet
    from fedspeed.evaluation.lm_eval_runs import run_tasks
    from fedspeed.evaluation.scoring import score_task
    from tests.limits import LIMIT_S

    quiet()
    join_world(LIMIT_S)
    tokenizer = byte_tokenizer()
    if has_tokenizer(Path(base)):
        tokenizer = load_tokenizer(ModelConfig(base=base))
    found = {}
    for kind in kinds:
        loaded = load_tasks(names, settings)
        with engine_lm(base, tokenizer, kind) as lm:
            found[kind] = summary([run_tasks(lm, tasks, settings) for tasks in loaded])
            if own and kind == "resident":
                task = make_task(own)
                items = task.items(settings.limit)
                scores = score_task(lm._engine, task, items, tokenizer=tokenizer, template=None)
                found["own"] = (
                    {category: tally.mean for category, tally in scores.main.items()},
                    [value for item in scores.items for value in item.logprobs],
                )
    model = hf_lm(base, tokenizer)
    found["hf"] = summary([run_tasks(model, tasks, settings) for tasks in load_tasks(names, settings)])
    leave_world()
    return found


def same(found, expected, within=1e-3):
    assert found.keys() == expected.keys()
    for name, result in found.items():
        assert result["scores"] == expected[name]["scores"]
        assert result["details"] == expected[name]["details"]
        assert result["logprobs"] == pytest.approx(expected[name]["logprobs"], abs=within)


def test_ready_questions_score_as_with_the_hf_model_and_as_our_own_task(tmp_path):
    base = write_llama(tmp_path / "base", vocab=260, seed=3)
    folder = write_questions(tmp_path / "data")
    settings = HarnessSettings(folders=(folder,))
    own = TaskContext(name="qa", options=entry_of("qa").options, folders=(folder,))
    [found] = run_clusters([1], with_both, base, ["fedspeed_qa"], settings, own=own)
    same(found["resident"], found["hf"])
    same(found["ram"], found["hf"])
    qa = found["hf"]["fedspeed_qa"]
    assert "not comparable" in qa["details"]["note"] and qa["details"]["lm_eval"] == "0.4.13"
    accuracy, logprobs = found["own"]
    assert {ALL if name == ALL else f"fedspeed_{name}": value for name, value in accuracy.items()} == qa[
        "scores"
    ]["acc"]
    assert logprobs == pytest.approx(qa["logprobs"], abs=1e-3)


SHORT = ("copa", "winogrande", "arc_easy")  # sets of short questions


@pytest.mark.parametrize(
    ("sets", "limit"), [(SHORT, 4), pytest.param(tuple(QA_SETS), 25, marks=pytest.mark.slow)]
)
def test_real_questions_score_as_with_the_hf_model(sets, limit):
    published_task("qa")
    folders = tuple(folder.resolve() for folder in data_folders())
    settings = HarnessSettings(folders=folders, limit=limit)
    own = TaskContext(name="qa", options={"sets": sets}, folders=folders)
    names = [f"fedspeed_{name}" for name in sets]
    [found] = run_clusters([1], with_both, str(smollm2()), names, settings, own=own)
    same(found["resident"], found["hf"])
    same(found["ram"], found["hf"])
    accuracy, logprobs = found["own"]
    for name in sets:
        assert accuracy[name] == found["hf"][f"fedspeed_{name}"]["scores"]["acc"][ALL]
    theirs = [value for name in names for value in found["hf"][name]["logprobs"]]
    assert logprobs == pytest.approx(theirs, abs=1e-3)
    assert len(theirs) >= 32
