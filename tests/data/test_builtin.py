"""The built-in task: deterministic, distinct, balanced, short, and in words the base has not been taught."""

import pytest

from fedspeed.data.builtin import SKILLS, builtin_rows, pretraining_rows
from fedspeed.data.templates import prompt
from fedspeed.errors import DataError


def test_rows_are_distinct_balanced_and_right():
    rows = builtin_rows(seed=3, n=603)
    assert len(rows) == len({(row.instruction, row.input) for row in rows}) == 603
    counts = [sum(row.category == skill for row in rows) for skill in SKILLS]
    assert sorted(counts) == [100, 100, 100, 101, 101, 101]
    assert all(
        row.instruction == row.category and row.output == SKILLS[row.category](row.input) for row in rows
    )
    assert len(SKILLS) >= 4 and len({skill[0] for skill in SKILLS}) == len(SKILLS)


def test_skills_by_example():
    assert {skill: answer("habe") for skill, answer in SKILLS.items()} == {
        "copy": "habe",
        "double": "hhaabbee",
        "last": "e",
        "next": "abcf",
        "reverse": "ebah",
        "upper": "HABE",
    }


def test_rows_depend_on_the_seed_only():
    assert builtin_rows(1, 60) == builtin_rows(1, 60) != builtin_rows(2, 60)
    assert pretraining_rows(1, 60) == pretraining_rows(1, 60) != pretraining_rows(2, 60)


def test_rows_are_short():
    rows = builtin_rows(0, 600) + pretraining_rows(0, 600)
    assert max(len(prompt(row, "plain")) for row in rows) <= 30
    assert max(len(row.output) for row in rows) <= 10


def test_every_row_there_is_and_not_one_more():
    assert len({(row.instruction, row.input) for row in builtin_rows(0, 4096 * len(SKILLS))}) == 4096 * len(
        SKILLS
    )
    with pytest.raises(DataError, match="24576 different rows, 24577 were asked for; lower data.max_rows"):
        builtin_rows(0, 4096 * len(SKILLS) + 1)


def test_pretraining_teaches_every_skill_under_other_words():
    meaning = {}
    for row in pretraining_rows(0, 3000) + pretraining_rows(1, 3000):
        assert row.output == SKILLS[row.category](row.input)
        assert (
            meaning.setdefault(row.instruction, row.category) == row.category
        )  # one word means one skill, whatever the seed
    assert not set(meaning) & set(SKILLS)
    assert {skill: list(meaning.values()).count(skill) for skill in SKILLS} == dict.fromkeys(SKILLS, 16)
