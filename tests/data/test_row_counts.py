"""What data.max_tokens takes from rows, and what else in them is hardly meant, is counted and told."""

import json

import pytest

from fedspeed.config.load import load
from fedspeed.data.clients import client_rows, encode_client
from fedspeed.data.config import DataConfig
from fedspeed.data.row_counts import RowCounts, RowTable, count_values
from fedspeed.data.row_remarks import row_remarks
from fedspeed.errors import DataError
from fedspeed.models.tokenizer import byte_tokenizer
from fedspeed.session import preflight
from tests.run.launched import LLAMA

CUT, LOST, WHOLE = (
    {"instruction": "q" * n, "output": "a" * 9} for n in (20, 40, 2)
)  # of 32 tokens the prompt takes n + 2


def file_config(folder, records, **changes) -> DataConfig:
    path = folder / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps(record | {"instruction": f"{i:02}{record['instruction']}"}) + "\n"
            if record is not None
            else "\n"
            for i, record in enumerate(records)
        )
    )
    return DataConfig(
        **{"task": "file", "path": str(path), "clients": 1, "max_tokens": 32, "template": "plain"} | changes
    )


def test_kept_cut_and_lost_rows_are_counted(tmp_path):
    config = file_config(tmp_path, [CUT] * 3 + [LOST] * 2 + [WHOLE] * 5, val_fraction=0.3)
    (rows,) = client_rows(config, 0)
    counts = encode_client(rows, byte_tokenizer(), config).counts
    assert counts == RowCounts(rows=10, cut=3, lost=2)
    assert (counts.kept, counts.harmed) == (8, 0.5)


def test_only_sums_where_only_sums_may_be_known():
    clients = [RowCounts(10, 3, 2), RowCounts(30, 0, 0)]
    each = RowTable.from_values([*count_values(clients[0]), *count_values(clients[1])], 64, sums_only=False)
    total = RowTable.from_values([40.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0], 64, sums_only=True)
    assert each == RowTable.of(clients, 64) and each.clients == tuple(clients)
    assert (total.total, total.clients, total.client_lines()) == (each.total, (), [])
    assert (
        each.line()
        == total.line()
        == (
            "40 rows: 38 kept, 3 of them cut (the end of the answer lies beyond data.max_tokens=64); "
            "2 lost (nothing of the answer lies within it)"
        )
    )
    assert each.client_lines() == [
        "client 0: 10 rows: 8 kept, 3 of them cut; 2 lost",
        "client 1: 30 rows, all kept whole",
    ]
    assert "client" not in total.warnings()[0] and "(most at client 0: 50.0 %)" in each.warnings()[0]
    assert total.warnings() == [
        "data.max_tokens=64 takes the end of the answer from 3 of 40 rows (7.5 %), so that the model "
        "does not learn to stop there, and the whole answer from 2 of 40 rows (5.0 %), which are left "
        "out; raise it, or shorten the rows"
    ]


@pytest.mark.parametrize(
    ("counts", "warned"),
    [((1000, 10, 0), False), ((1000, 10, 1), True), ((1000, 0, 11), True), ((5, 0, 0), False)],
)
def test_a_warning_above_one_percent(counts, warned):
    texts = RowTable.of([RowCounts(*counts)], 64).warnings()
    assert bool(texts) == warned
    assert all(("the end" in text, "the whole" in text) == (counts[1] > 0, counts[2] > 0) for text in texts)


def test_one_client_above_one_percent_among_many_is_warned_of():
    table = RowTable.of([RowCounts(100_000, 0, 0), RowCounts(10, 9, 0)], 64)
    assert "most at client 1: 90.0 %" in table.warnings()[0]


def test_many_clients_do_not_fill_the_screen():
    table = RowTable.of([RowCounts(10, 1, 0)] * 40, 64)
    assert len(table.client_lines()) == 17 and table.client_lines()[-1] == "and 24 more clients"


def test_blank_answers_and_missing_categories_are_reported(tmp_path):
    records = [WHOLE | {"category": name} for name in ("x", "x", "y", "y", "", " ")] + [
        WHOLE | {"output": " ", "category": "x"}
    ]
    config = file_config(tmp_path, records, split="meta", clients=3)
    found = row_remarks(config, client_rows(config, 0))
    assert found[0].startswith("1 of 7 rows have a blank answer")
    assert found[1].startswith("2 of 7 rows have no category: data.split=meta treats them as one category")
    assert len(found) == 2


def test_nothing_is_said_of_good_rows(tmp_path):
    config = file_config(tmp_path, [WHOLE] * 12, clients=2)
    assert row_remarks(config, client_rows(config, 0)) == []


def test_a_field_that_is_blank_in_every_row_is_the_wrong_one(tmp_path):
    with pytest.raises(
        DataError,
        match="none of the 4 rows has an answer, field 'output' is blank in all of them.*data.output_field",
    ):
        client_rows(file_config(tmp_path, [WHOLE | {"output": "\n"}] * 4), 0)


def test_copies_at_several_clients_are_reported(tmp_path):
    """Every row is there twice, and the shuffle gives most of the copies to another client."""
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"{i}", "output": "a"}) + "\n" for i in range(40)) * 2)
    config = DataConfig(task="file", path=str(path), clients=4, val_fraction=0.25, template="plain")
    clients = client_rows(config, 0)
    trained = [{row for row in client.train} for client in clients]
    shared = sum(any(row in rows for rows in trained) for client in clients for row in client.val)
    held_out = sum(len(client.val) for client in clients)
    several, seen = row_remarks(config, clients)
    assert "different rows are training rows of more than one client" in several
    assert shared and seen.startswith(
        f"{shared} of {held_out} held-out rows are also training rows of another client"
    )


def test_clients_whose_rows_are_all_equal_hold_out_none(tmp_path):
    path = tmp_path / "equal.jsonl"
    path.write_text((json.dumps({"instruction": "1 + 1", "output": "2"}) + "\n") * 10)
    config = DataConfig(task="file", path=str(path), clients=2, val_fraction=0.2)
    clients = client_rows(config, 0)
    assert [(len(client.train), len(client.val)) for client in clients] == [(5, 0)] * 2
    assert any(text.startswith("clients that hold out no row") for text in row_remarks(config, clients))


def test_the_dry_run_reports_all_of_it(tmp_path):
    config = file_config(tmp_path, [CUT] * 3 + [LOST] * 2 + [WHOLE] * 5 + [WHOLE | {"output": ""}])
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{base: {tmp_path}, init: random, dtype: fp32, tokenizer: bytes}}\n"
        f"data: {{task: file, path: {config.path}, clients: 2, max_tokens: 32, template: plain}}\n"
    )
    lines = preflight.look_inside(load(path)).splitlines()
    assert lines[0].startswith("rows     11 rows: 9 kept, 3 of them cut (") and "2 lost" in lines[0]
    assert [line.split(":")[0] for line in lines[1:3]] == ["         client 0", "         client 1"]
    assert lines[3].startswith(
        "note     data.max_tokens=32 takes the end of the answer from 3 of 11 rows (27.3 %)"
    )
    assert lines[4].startswith("note     1 of 11 rows have a blank answer")
