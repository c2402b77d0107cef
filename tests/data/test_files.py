"""Kinds of data files other than JSON, which tests/data/test_rows.py covers."""

import json
import sys

import pyarrow
import pytest
from pyarrow import parquet

from fedspeed.data.files import SUFFIXES, records
from fedspeed.data.formats import Fields
from fedspeed.data.read import Layout, read_rows
from fedspeed.data.rows import Message, Row
from fedspeed.errors import DataError
from tests.data.data_files import write

TABLE = 'instruction,input,output\r\n"say ""hi"", please",,"one\r\ntwo"\r\n\r\nhé,"a,b",c'
ROWS = [Row('say "hi", please', "", "one\r\ntwo", ""), Row("hé", "a,b", "c", "")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", TABLE),
        ("a.csv.gz", "\ufeff" + TABLE),
        ("a.tsv", TABLE.replace("a,b", "A").replace("please", "now").replace(",", "\t")),
    ],
)
def test_a_table_is_read_by_its_header(tmp_path, name, text):
    path = write(tmp_path, name, text)
    rows = read_rows(path, Layout())
    assert [where for where, _ in rows] == [f"{path}:2", f"{path}:5"]
    found = [row for _, row in rows]
    assert found == ROWS if "csv" in name else [row.input for row in found] == ["", "A"]


def test_a_long_field_is_read(tmp_path):
    text = "x" * 1_000_000
    path = write(tmp_path, "a.csv", f"prompt,completion\n{text},y\n")
    ((_, row),) = read_rows(path, Layout(format="auto"))
    assert row == Row(text, "", "y", "", is_completion=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "instruction,output\na,b\nc\n", r"a.csv:3: 1 fields, and the header has 2: list \[\"c\"\]"),
        ("a.csv", "instruction,output\na,b,c\n", r"a.csv:2: 3 fields, and the header has 2"),
        ("a.csv", 'instruction,output\na,b\n"c\n', r"a.csv:3: not a table .unexpected end of data"),
        ("a.csv", 'instruction,output\n"a"b,c\n', r"a.csv:2: not a table .*double the quotes inside"),
        ("a.csv", "instruction,output,output\na,b,c\n", r"a.csv:1: two columns are called 'output'"),
        ("a.csv", "instruction;output\na;b\n", r"a.csv:1: .*one column with ';' in its name; columns are"),
        ("a.csv", b"instruction,output\n\xff,b\n", r"a.csv:2: not UTF-8"),
        ("a.csv", "", r"a.csv: the file holds no rows"),
        ("a.csv", "instruction,output\n", r"a.csv: the file holds no rows"),
        ("a.csv", "question,output\na,b\n", r"a.csv:2: no field 'instruction' .*data.instruction_field"),
        ("a.parquet", b"PAR1 or not", r"a.parquet: cannot be read as parquet .*copy the file again"),
    ],
)
def test_faults_of_tables(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read_rows(write(tmp_path, name, content), Layout())


def test_parquet_with_conversations(tmp_path):
    """Parquet gives every message all fields, with null where it has none."""
    conversation = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a", "weight": 1, "tool_calls": None},
    ]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": conversation, "category": "c"}] * 3), path)
    rows = read_rows(path, Layout(format="auto"))
    assert [where for where, _ in rows] == [f"{path}, row {number}" for number in range(3)]
    assert rows[2][1].messages == (Message("system", "s"), Message("user", "u"), Message("assistant", "a"))
    assert rows[2][1].category == "c"


def test_parquet_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="a.parquet: reading parquet needs a library: pip install pyarrow"):
        list(records(tmp_path / "a.parquet"))


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    record = {"instruction": "i", "input": "", "output": "o", "category": "c"}
    content = {
        ".json": json.dumps([record]),
        ".jsonl": json.dumps(record),
        ".csv": "instruction,input,output,category\ni,,o,c\n",
        ".tsv": "instruction\tinput\toutput\tcategory\ni\t\to\tc\n",
    }
    parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "a.parquet")
    for suffix in SUFFIXES:
        path = tmp_path / f"a{suffix}"
        if suffix != ".parquet":
            write(tmp_path, path.name, content[suffix.removesuffix(".gz")])
        assert [row for _, row in read_rows(path, Layout(Fields()))] == [Row("i", "", "o", "c")]
