"""Questions with given answers: their prompts and their score."""

import json

import pytest

from fedspeed.data.eval_task import Likelihood
from fedspeed.errors import DataError
from fedspeed.evaluation.config import QA_SETS
from fedspeed.evaluation.context import TaskContext, entry_of, make_task
from tests.evaluation.published_data import published_task

COPA = {"query": "The man turned on the tap, therefore", "choices": ["it rang.", "water flowed."], "gold": 1}
ARC = {"query": "Question: What shines?\n", "choices": ["sun", "stone", "mud", "ice"], "gold": 0}
PRONOUN = {
    "context_options": ["Ann helped Eve so Ann", "Ann helped Eve so Eve"],
    "continuation": "was thanked.",
}
SIZES = {
    "boolq": 3270,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "piqa": 1838,
    "winogrande": 1267,
    "copa": 100,
}


def write(folder, name, records):
    (folder / f"qa_{name}.jsonl").write_text("\n".join(json.dumps(record) for record in records))


def task(folder, name):
    return make_task(TaskContext(name=name, options=entry_of(name).options, folders=(folder,)))


@pytest.mark.parametrize(
    ("name", "record", "pairs"),
    [
        ("copa", COPA, [(COPA["query"], " it rang."), (COPA["query"], " water flowed.")]),
        ("arc_easy", ARC, [("Question: What shines?\nAnswer:", f" {text}") for text in ARC["choices"]]),
        (
            "winogrande",
            PRONOUN | {"gold": 0},
            [(text, " was thanked.") for text in PRONOUN["context_options"]],
        ),
    ],
)
def test_what_is_scored(tmp_path, name, record, pairs):
    write(tmp_path, name, [record])
    made = task(tmp_path, name)
    [item] = made.items()
    assert list(zip(made.prompts(item), made.choices(item), strict=True)) == pairs
    assert made.prompt(item) == pairs[0][0] and item.right == record["gold"] and made.category(item) == ""


def test_the_right_choice_must_be_the_likeliest(tmp_path):
    write(tmp_path, "copa", [COPA, COPA])
    copa = task(tmp_path, "copa")
    better = [Likelihood(-9.0, 3), Likelihood(-8.0, 2)]
    longer = [Likelihood(-8.0, 3), Likelihood(-9.0, 2)]
    assert copa.score(copa.items(), [better, longer]) == [
        {"accuracy": 1.0, "accuracy_by_length": 1.0},
        {"accuracy": 0.0, "accuracy_by_length": 1.0},
    ]


def test_all_sets_together_have_a_category_each(tmp_path):
    for name in QA_SETS:
        write(tmp_path, name, [PRONOUN | {"gold": 1}] * 4 if name == "winogrande" else [ARC] * 3)
    qa = task(tmp_path, "qa")
    items = qa.items(2)  # of each set
    assert [qa.category(item) for item in items] == [name for name in QA_SETS for _ in range(2)]
    assert len(qa.items()) == 19 and len(qa.files()) == 6
    assert "not comparable" in qa.describe()["note"]


@pytest.mark.parametrize(
    "change",
    [{"gold": 4}, {"gold": "1"}, {"gold": -1}, {"choices": None}, {"choices": ["sun", ""]}, {"query": None}],
    ids=str,
)
def test_a_record_of_another_kind_is_refused(tmp_path, change):
    write(tmp_path, "arc_easy", [ARC, ARC | change])
    with pytest.raises(DataError, match="qa_arc_easy.jsonl:2: this is no question with choices"):
        task(tmp_path, "arc_easy").items()


def test_missing_data_is_named(tmp_path):
    with pytest.raises(DataError, match="evaluation task piqa: none of qa_piqa.jsonl.gz, .*open_lm"):
        task(tmp_path, "piqa")


def test_published_questions():
    qa = published_task("qa")
    items = qa.items()
    counts = {name: sum(qa.category(item) == name for item in items) for name in QA_SETS}
    assert counts == SIZES
    assert len(qa.items(100)) == 600
    for item in items:
        assert all(text.strip() == text[1:] and text[0] == " " for text in item.choices), item
        assert all(prompt == prompt.strip() for prompt in item.prompts)
