"""GSM8K: its prompts, its items and its score."""

import gzip
import json

import pytest

from fedspeed.data.rows import Row
from fedspeed.errors import DataError
from fedspeed.evaluation.context import TaskContext, entry_of, make_task
from fedspeed.evaluation.number_answers import extract_number
from fedspeed.evaluation.tasks.gsm8k import expected_number
from fedspeed.evaluation.tasks.gsm8k_prompt import DEMONSTRATIONS
from tests.evaluation.published_data import published_task

RECORDS = [
    {"question": "Ann has 2 eggs and buys 3. How many?", "answer": "2+3=<<2+3=5>>5 eggs.\n#### 5"},
    {"question": "Bob has 1,200 coins and loses 1,210.", "answer": "He owes 10.\n#### -10"},
    {"question": "How far?", "answer": "1000 * 2 = 2,000 miles\n#### 2,000"},
]


@pytest.fixture
def task(tmp_path):
    def make(name, records=RECORDS, samples=0):
        lines = "\n".join(json.dumps(record) for record in records)
        with gzip.open(tmp_path / "gsm8k_test.jsonl.gz", "wt") as file:
            file.write(lines)
        options = entry_of(name).options
        return make_task(TaskContext(name=name, options=options, folders=(tmp_path,), samples=samples))

    return make


def test_the_prompt_has_eight_examples_whose_results_are_right(task):
    few_shot = task("gsm8k")
    prompt = few_shot.prompt(few_shot.items()[0])
    parts = prompt.split("\n\n")
    assert len(parts) == 9 and parts[-1] == "Q: Ann has 2 eggs and buys 3. How many?\nA:"
    assert all(part.startswith("Q: ") and part.count("\nA: ") == 1 for part in parts[:-1])
    topics = ("trees", "cars", "chocolates", "lollipops", "toys", "computers", "golf balls", "bagels")
    assert all(topic in part for topic, part in zip(topics, parts, strict=False))
    for part, (_, _, result) in zip(parts, DEMONSTRATIONS):
        assert part.endswith(f"The answer is {result}.") and str(extract_number(part)) == result
    assert few_shot.settings.max_new == 256 and few_shot.settings.temperature == 0
    assert few_shot.settings.stop_texts == ("\nQ:",)


def test_zero_shot_goes_through_the_template_of_the_model(task):
    zero_shot = task("gsm8k_zero_shot")
    [first, *_] = zero_shot.items()
    assert zero_shot.prompt(first) == Row(RECORDS[0]["question"], "", RECORDS[0]["answer"], "")
    assert zero_shot.settings.stop_texts == () and zero_shot.files() == [task("gsm8k").files()[0]]


def test_answers_count_by_their_numbers(task):
    few_shot = task("gsm8k")
    items = few_shot.items()
    answers = [["So 2 + 3 = 5. The answer is 5.00."], ["The answer is -$10"], ["The answer is 2,000 miles."]]
    assert few_shot.score(items, answers) == [1, 1, 1]
    assert few_shot.score(items, [["The answer is 6. #### 5"], ["It is 10."], [""]]) == [0, 0, 0]
    assert task("gsm8k", samples=2).score(items[:1], [["5", "6"]]) == [0.5]


def test_a_row_without_a_result_is_refused(task):
    broken = task("gsm8k", [*RECORDS, {"question": "Why?", "answer": "Because 7."}])
    with pytest.raises(DataError, match="gsm8k_test.jsonl.gz:4: the answer has no line '#### number'"):
        broken.items()


def test_a_limit_is_a_fixed_choice_and_part_of_larger_ones(task):
    many = task("gsm8k", [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(300)])
    [few, more, everything] = [[row.instruction for row in many.items(limit)] for limit in (20, 100, 0)]
    assert len(few) == 20 and set(few) < set(more) and few != everything[:20]
    assert few == sorted(few, key=everything.index) and few == [row.instruction for row in many.items(20)]


def test_all_published_solutions_are_right_and_broken_ones_wrong():
    published = published_task("gsm8k")
    items = published.items()
    assert len(items) == 1319
    assert sum(published.score(items, [[row.output] for row in items])) == 1319
    said = [[f"The answer is ${expected_number(row):,}.00 in all."] for row in items]
    assert sum(published.score(items, said)) == 1319
    wrong = [[f"{row.output.partition('####')[0]}\n#### {expected_number(row) + 1}"] for row in items]
    assert sum(published.score(items, wrong)) == 0
