"""The formats of records: what each becomes, how it is recognised, and what is refused."""

import json
import re
from pathlib import Path

import pytest

from fedspeed.data import split_files
from fedspeed.data.config import DataConfig, FormatName
from fedspeed.data.formats import FORMATS, Fields, format_name, to_record
from fedspeed.data.record import Record
from fedspeed.data.rows import Message, Row
from fedspeed.data.tasks import load_rows
from fedspeed.errors import DataError

SYSTEM, USER, ANSWER, TOOL = (
    {"role": role, "content": role[0]} for role in ("system", "user", "assistant", "tool")
)
HUMAN, GPT = ({"from": role, "value": role[0]} for role in ("human", "gpt"))
TWO_TURNS = (Message("user", "u"), Message("assistant", "a"), Message("user", "u"), Message("assistant", "a"))


def messages(*items, **fields):
    return {"messages": list(items), **fields}


def sharegpt(*items, **fields):
    return {"conversations": list(items), **fields}


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


@pytest.mark.parametrize(
    ("name", "record", "row"),
    [
        (
            "instruction",
            {"instruction": "i", "input": "x", "output": "o", "category": 3},
            Row("i", "x", "o", "3"),
        ),
        ("messages", messages(USER, ANSWER, category="c"), Row("u", "", "a", "c")),
        ("messages", {"conversations": [USER, ANSWER]}, Row("u", "", "a", "")),
        ("messages", messages(USER, ANSWER, USER, ANSWER), Row("", "", "a", "", messages=TWO_TURNS)),
        (
            "messages",
            messages(USER, ANSWER, TOOL, USER),  # what follows the last answer is left out
            Row("u", "", "a", ""),
        ),
        (
            "messages",
            messages(USER, ANSWER | {"weight": 0}, TOOL, ANSWER | {"weight": 1}),
            Row(
                "",
                "",
                "a",
                "",
                messages=(
                    Message("user", "u"),
                    Message("assistant", "a", trained=False),
                    Message("tool", "t"),
                    Message("assistant", "a"),
                ),
            ),
        ),
        (
            "messages",
            messages({"role": "developer", "content": "d"}, USER, ANSWER | {"tool_calls": [], "name": None}),
            Row(
                "",
                "",
                "a",
                "",
                messages=(Message("system", "d"), Message("user", "u"), Message("assistant", "a")),
            ),
        ),
        (
            "messages",
            messages(
                USER | {"content": [{"type": "text", "text": "x "}, {"type": "text", "text": "y"}]}, ANSWER
            ),
            Row("x y", "", "a", ""),
        ),
        ("sharegpt", sharegpt(HUMAN, GPT), Row("h", "", "g", "")),
        (
            "sharegpt",
            sharegpt(HUMAN, GPT, system="s", tools=""),
            Row(
                "",
                "",
                "g",
                "",
                messages=(Message("system", "s"), Message("user", "h"), Message("assistant", "g")),
            ),
        ),
        ("prompt_completion", pair("p ", "c"), Row("p ", "", "c", "", is_completion=True)),
        ("prompt_completion", pair([USER], [ANSWER]), Row("u", "", "a", "")),
        (
            "prompt_completion",
            pair([USER, ANSWER, USER], [ANSWER]),
            Row(
                "",
                "",
                "a",
                "",
                messages=(TWO_TURNS[0], Message("assistant", "a", trained=False), *TWO_TURNS[2:]),
            ),
        ),
        ("text", {"text": "once\n", "category": "c"}, Row("", "", "once\n", "c", is_text=True)),
    ],
)
def test_a_record_is_recognised_becomes_a_row_and_is_written_again(name, record, row):
    found = Record(record, "f:1")
    assert format_name(found, Fields()) == name
    assert FORMATS[name].row(found, Fields()) == row
    again = Record(split_files.record(row), "g:1")
    assert FORMATS[format_name(again, Fields())].row(again, Fields()) == row


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("messages", messages(), r"f:1: field 'messages' has no messages"),
        ("messages", {"messages": "hi"}, r"f:1: field 'messages' must be a list, this is str \"hi\""),
        ("messages", messages("hi"), r"f:1, messages\[0\]: must be an object"),
        ("messages", messages(USER), r"no assistant message to train on .its roles are user."),
        ("messages", messages(USER, ANSWER | {"weight": 0}), r"no assistant message to train on"),
        (
            "messages",
            messages(USER, ANSWER | {"weight": 0.5}),
            r"messages\[1\]: field 'weight' is float 0.5, but must be 0 .no loss. or 1",
        ),
        ("messages", messages(USER, {"role": "assistant"}), r"f:1, messages\[1\]: no field 'content'"),
        ("messages", messages(USER, ANSWER | {"content": None}), r"'content' must be text, this is NoneType"),
        (
            "messages",
            messages({"role": "function", "content": "1"}, ANSWER),
            r"messages\[0\]: 'role' is str \"function\", which is no role .*one of system, .*remove the",
        ),
        (
            "messages",
            messages(USER, ANSWER | {"content": "", "tool_calls": [{"id": "1"}]}),
            r"messages\[1\]: field 'tool_calls' cannot be trained on, only text can; rewrite",
        ),
        ("messages", messages(USER, ANSWER, tools=[{}]), r"f:1: field 'tools' describes tools"),
        (
            "messages",
            messages(USER | {"content": [{"type": "image_url", "image_url": {}}]}, ANSWER),
            r"messages\[0\], content\[0\]: a part of type str \"image_url\" cannot be trained on",
        ),
        (
            "messages",
            messages({"role": "user", "content": ""}, ANSWER | {"content": " "}),
            "the conversation is empty",
        ),
        ("messages", messages(USER, ANSWER | {"content": "\ud800"}), r"messages\[1\]: field 'content' holds"),
        (
            "sharegpt",
            sharegpt({"from": "function_call", "value": "f"}, GPT),
            r"\"function_call\", which is no",
        ),
        (
            "sharegpt",
            sharegpt({"from": "system", "value": "s"}, HUMAN, GPT, system="t"),
            r"f:1: the record has a system prompt in field 'system' and another one",
        ),
        (
            "prompt_completion",
            pair([USER], "a"),
            r"of 'prompt' and 'completion' one is a list and one is not",
        ),
        ("prompt_completion", pair(" ", ""), "prompt and completion are blank"),
        ("prompt_completion", {"prompt": "a"}, "no field 'completion'"),
        ("text", {"text": "\n"}, "field 'text' is blank"),
        ("text", {"text": 3}, "field 'text' must be text, this is int 3"),
    ],
)
def test_a_record_that_cannot_be_represented_is_refused(name, record, message):
    with pytest.raises(DataError, match=message):
        FORMATS[name].row(Record(record, "f:1"), Fields())


ALL = {"instruction": "i", "output": "o"} | messages(USER, ANSWER)


@pytest.mark.parametrize(
    ("record", "fields", "name"),
    [
        ({"instruction": "i", "output": "o", "text": "copy"}, Fields(), "instruction"),
        (pair("p", "c"), Fields(instruction="prompt", output="completion"), "instruction"),
        (ALL | {"q": "q"}, Fields(instruction="q"), "instruction"),
        ({"instruction": None, "output": None, **messages(USER, ANSWER)}, Fields(), "messages"),
        ({"title": "a"}, Fields(), "instruction"),  # whose error names the fields
    ],
)
def test_what_decides_between_formats(record, fields, name):
    assert format_name(to_record(record, "f:1"), fields) == name


def test_several_formats_are_not_guessed_between():
    with pytest.raises(DataError, match=r"f:1: .*several formats .instruction, messages.*in data.format"):
        format_name(Record(ALL, "f:1"), Fields())


def test_the_configuration_offers_exactly_the_formats_there_are():
    assert set(FormatName.__args__) == {"auto", *FORMATS}


def test_each_file_has_its_own_format_and_a_fault_names_file_and_line(tmp_path):
    def write(name, *records):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    write("1.jsonl", messages(USER, ANSWER), messages(USER, ANSWER))
    write("2.jsonl", {"text": "t"})
    assert [row.output for row in load_rows(DataConfig(task="file", path=str(tmp_path)), 0)] == [
        "a",
        "a",
        "t",
    ]
    write("2.jsonl", {"text": "t"}, messages(USER, ANSWER))
    with pytest.raises(DataError, match=r"2\.jsonl:2: no field 'text' .the record has: messages."):
        load_rows(DataConfig(task="file", path=str(tmp_path)), 0)
    with pytest.raises(DataError, match=r"1\.jsonl:1: no field 'prompt'"):
        load_rows(DataConfig(task="file", path=str(tmp_path), format="prompt_completion"), 0)


def test_the_examples_of_the_page_are_of_their_formats():
    """The formats that docs/data.md shows are those there are, and each example is recognised."""
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    examples = re.findall(r"^\*\*(\w+)\*\*:.*?```json\n(.*?)```", page, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in examples] == list(FORMATS)
    for name, text in examples:
        record = to_record(json.loads(text), name)
        assert format_name(record, Fields()) == name
        FORMATS[name].row(record, Fields())
