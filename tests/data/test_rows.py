"""Readers: every format gives the same rows, and every fault of a file names file, line and remedy."""

import gzip
import json
import sys
import types

import pytest

from fedspeed.data.formats import Fields
from fedspeed.data.read import Layout, hub_rows, read_rows
from fedspeed.data.rows import Row
from fedspeed.errors import DataError
from tests.data.data_files import write

RECORDS = [
    {"instruction": "add", "input": "1 2", "output": "3", "category": "maths"},
    {"instruction": "greet", "input": None, "output": "h\u00e9 \u2028 \u6f22", "extra": 7},
]
ROWS = [Row("add", "1 2", "3", "maths"), Row("greet", "", "h\u00e9 \u2028 \u6f22", "")]
LINES = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS) + "\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl.gz", LINES),
        ("a.jsonl", "\ufeff\n" + LINES.replace("\n", "\r\n\r\n")),
        ("a.json", json.dumps(RECORDS, indent=1)),
        ("a.json.gz", json.dumps(RECORDS)),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, name, text):
    assert [row for _, row in read_rows(write(tmp_path, name, text), Layout())] == ROWS


def test_fields_are_mapped(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"q": "1+1", "a": "2", "level": 3}')
    assert read_rows(path, Layout(Fields("q", "", "a", "level"))) == [(f"{path}:1", Row("1+1", "", "2", "3"))]


GOOD = '{"instruction": "a", "output": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", GOOD + "{oops\n", ("a.jsonl:2:", "not JSON", "{oops", "one JSON object a line")),
        ("a.jsonl", GOOD + "[1]\n", ("a.jsonl:2:", "JSON object", "list [1]")),
        (
            "a.jsonl",
            GOOD + '{"instruction": "a", "answer": "b"}',
            ("a.jsonl:2:", "'output'", "instruction, answer", "data.output_field"),
        ),
        ("a.jsonl", '{"instruction": "a", "output": 3}', ("a.jsonl:1:", "'output'", "int 3", "must be text")),
        (
            "a.jsonl",
            '{"instruction": "a", "output": "b", "input": ["c"]}',
            ("a.jsonl:1:", "'input'", 'list ["c"]'),
        ),
        (
            "a.jsonl",
            '{"instruction": "a", "output": "b", "category": {"c": 1}}',
            ("a.jsonl:1:", "data.category_field"),
        ),
        (
            "a.jsonl",
            GOOD.encode() + b'{"instruction": "\xe9"}',
            ("a.jsonl:2:", "not UTF-8", "0xe9", "save the file as UTF-8"),
        ),
        ("a.jsonl", "\n \n", ("a.jsonl:", "no rows")),
        ("a.json", "", ("a.json:", "no rows")),
        ("a.json", "[]", ("a.json:", "no rows")),
        ("a.json", '[\n{"instruction": 1,,}]', ("a.json:2:", "not JSON", "column 19", ".jsonl")),
        ("a.json", "[" * 100_000, ("a.json:", "nested too deeply")),
        ("a.jsonl", GOOD + "[" * 100_000, ("a.jsonl:2:", "nested too deeply")),
        (
            "a.json",
            '[{"instruction": "a", "output": "b", "id": ' + "7" * 5000 + "}]",
            ("a.json:", "whole number of 5000 digits, 777777777777"),
        ),
        (
            "a.jsonl",
            GOOD + '{"id": -' + "7" * 5000 + "}\n",
            ("a.jsonl:2:", "whole number of 5001 digits, -77777777777"),
        ),
        (
            "a.jsonl",
            GOOD + '{"instruction": " ", "input": "", "output": "\\n"}',
            ("a.jsonl:2:", "the row is empty", "remove it"),
        ),
        ("a.json", '{"instruction": "a", "output": "b"}', ("a.json:", "one JSON list", "dict")),
        (
            "a.json",
            '[{"instruction": "a", "output": "b"}, {}]',
            ("a.json, item 1:", "'instruction'", "nothing"),
        ),
        ("a.txt", "a,b", ("a.txt:", "unknown kind of file", ".jsonl.gz")),
    ],
)
def test_a_fault_names_file_place_and_remedy(tmp_path, name, content, words):
    with pytest.raises(DataError) as error:
        read_rows(write(tmp_path, name, content), Layout())
    assert str(tmp_path) in str(error.value)
    assert [word for word in words if word not in str(error.value)] == []


def test_truncated_gzip(tmp_path):
    whole = gzip.compress(
        b"".join(json.dumps({"instruction": str(i * i), "output": "b"}).encode() + b"\n" for i in range(2000))
    )
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        DataError, match=r"a\.jsonl\.gz: the gzip stream ends after line \d+.*truncated.*download it again"
    ):
        read_rows(path, Layout())


@pytest.mark.parametrize(
    "damage", [lambda data: b"plain text", lambda data: data[:40] + bytes(20) + data[60:]]
)
def test_damaged_gzip(tmp_path, damage):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(damage(gzip.compress(LINES.encode() * 20)))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: damaged gzip file"):
        read_rows(path, Layout())


def test_unreadable_path(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("absent.jsonl", "folder.jsonl"):
        with pytest.raises(DataError, match=name + ": cannot be read.*check the path"):
            read_rows(tmp_path / name, Layout())


def test_hub_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="data.path=some/set.*pip install datasets"):
        hub_rows("some/set", Layout())


def fake_datasets(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_hub_set_and_its_configuration(monkeypatch):
    calls = []
    fake_datasets(monkeypatch, lambda *args, **kwargs: calls.append((args, kwargs)) or RECORDS)
    assert [row for _, row in hub_rows("some/set:main", Layout())] == ROWS
    assert hub_rows("some/set", Layout())[1][0] == "some/set, item 1"
    assert calls == [(("some/set", "main"), {"split": "train"}), (("some/set", None), {"split": "train"})]


def test_the_real_library_reads_a_set(monkeypatch, tmp_path):
    """A folder named like a hub set is what the library itself takes for one."""
    folder = tmp_path / "some" / "set"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert [row for _, row in hub_rows("some/set", Layout())] == ROWS


def test_hub_that_cannot_be_reached(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    fake_datasets(monkeypatch, offline)
    with pytest.raises(
        DataError, match="data.path=some/set.*ConnectionError: no route.*a local file .[.]jsonl"
    ):
        hub_rows("some/set", Layout())


def test_hub_set_without_rows(monkeypatch):
    fake_datasets(monkeypatch, lambda *args, **kwargs: [])
    with pytest.raises(DataError, match="some/set: the train split.*no rows"):
        hub_rows("some/set", Layout())


def test_half_a_character_is_named(tmp_path):
    """JSON may escape a lone surrogate, which no tokenizer takes."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": "b\\ud800"}\n')
    with pytest.raises(
        DataError,
        match=r"a\.jsonl:2: field 'output' holds '\\ud800' at character 1, half of a character; correct the "
        r"record",
    ):
        read_rows(path, Layout())
    path.write_text(GOOD[:-2] + ', "category": "\\udc00"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: field 'category' holds '\\udc00' at character 0"):
        read_rows(path, Layout())
    path.write_text('{"instruction": "a", "output": "\\ud83d\\ude00"}\n')
    assert read_rows(path, Layout())[0][1].output == "\U0001f600"
