"""Rows to clients: split first, hold out second, and each client's parts are its own."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedspeed.config.load import load
from fedspeed.data.clients import client_rows, encode_client, largest_id
from fedspeed.data.config import DataConfig
from fedspeed.data.row_remarks import row_remarks
from fedspeed.data.sources import FOLDER_VARIABLE
from fedspeed.data.tasks import load_rows
from fedspeed.data.templates import prompt
from fedspeed.errors import DataError
from fedspeed.models.config import AdapterConfig, ModelConfig
from fedspeed.models.loading import meta_model
from fedspeed.models.tokenizer import byte_tokenizer, check_ids
from fedspeed.session import preflight
from tests.tiny import write_llama

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def write(folder, records):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize("split", ["iid", "meta", "lda"])
def test_every_row_has_one_place(split):
    config = DataConfig(clients=4, split=split, max_rows=600, val_fraction=0.1)
    clients = client_rows(config, seed=5)
    assert [of.client for of in clients] == [0, 1, 2, 3]
    everywhere = [row for of in clients for row in of.train + of.val]
    assert sorted(everywhere, key=repr) == sorted(load_rows(config, seed=5), key=repr)


def test_a_client_is_held_out_on_its_own_categories():
    for of in client_rows(DataConfig(clients=6, split="meta", max_rows=600, val_fraction=0.1), seed=0):
        assert len({row.category for row in of.train}) == 1
        assert {row.category for row in of.val} == {row.category for row in of.train}
        assert (len(of.train), len(of.val)) == (90, 10)


def test_split_and_held_out_rows_each_depend_on_the_seed_only(tmp_path):
    # Rows of a file do not depend on the seed, as those of the built-in task do.
    path = write(tmp_path, [{"instruction": str(i), "output": "a"} for i in range(60)])

    def clients(n, seed):
        return client_rows(DataConfig(task="file", path=path, clients=n, val_fraction=0.1), seed)

    def owned(seed):
        return [set(of.train + of.val) for of in clients(3, seed)]

    assert clients(3, 1) == clients(3, 1)
    assert owned(1) != owned(2)
    assert clients(1, 1)[0].val != clients(1, 2)[0].val


@pytest.mark.parametrize(
    ("rows", "fraction", "limit", "held_out"),
    [
        (100, 0.1, 64, 10),
        (100, 0.5, 20, 20),
        (100, 0.0, 64, 0),
        (10, 0.02, 64, 1),
        (1, 0.5, 64, 0),
        (2, 0.9, 64, 1),
    ],
)
def test_how_many_rows_are_held_out(tmp_path, rows, fraction, limit, held_out):
    path = write(tmp_path, [{"instruction": str(i), "output": "a"} for i in range(rows)])
    (client,) = client_rows(
        DataConfig(task="file", path=path, clients=1, val_fraction=fraction, max_val_rows=limit), 0
    )
    assert (len(client.train), len(client.val)) == (rows - held_out, held_out)


@pytest.mark.parametrize("split", ["meta", "lda"])
def test_split_by_category_needs_categories(tmp_path, split):
    path = write(tmp_path, [{"instruction": "a", "output": "b"}] * 10)
    with pytest.raises(
        DataError, match=f"data.split={split} .*data.split=iid.*data.category_field=category names no field"
    ):
        client_rows(DataConfig(task="file", path=path, split=split), 0)


def test_more_clients_than_rows(tmp_path):
    path = write(tmp_path, [{"instruction": "a", "output": "b"}] * 2)
    with pytest.raises(DataError, match="2 rows are too few for 3 clients: no row for client 2"):
        client_rows(DataConfig(task="file", path=path, clients=3), 0)


def test_encoding_counts_what_it_drops(tmp_path):
    lengths = [3, 3, 3, 3, 3, 3, 90, 90]
    path = write(tmp_path, [{"instruction": str(i) * n, "output": "a"} for i, n in enumerate(lengths)])
    config = DataConfig(task="file", path=path, clients=1, val_fraction=0.25, max_tokens=32, template="plain")
    (rows,) = client_rows(config, 0)
    data = encode_client(rows, byte_tokenizer(), config)
    assert data.counts.lost == 2
    assert len(data.train) + len(data.val) == 6
    assert len(data.val) == sum(len(row.instruction) == 3 for row in rows.val)
    assert data.pad_id == 256


def test_a_pad_token_behind_the_vocabulary_is_not_needed(tmp_path):
    """Added to the tokenizer alone, as many fine-tuning recipes do: padding is masked, so another id
    serves.
    """
    base = write_llama(tmp_path, vocab=260)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 260
    config = DataConfig(clients=1, max_rows=6)
    data = encode_client(client_rows(config, 0)[0], tokenizer, config)
    assert data.pad_id == largest_id(data) == 258
    check_ids(largest_id(data), ModelConfig(base=base))
    stated = json.loads((tmp_path / "config.json").read_text()) | {"pad_token_id": 260}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    assert meta_model(ModelConfig(base=base, dtype="fp32"), AdapterConfig()).config.pad_token_id is None


def test_builtin_is_read_with_the_plain_template():
    config = DataConfig(clients=1, max_rows=6)
    (rows,) = client_rows(config, 0)
    example = encode_client(rows, byte_tokenizer(), config).train[0]
    assert (
        bytes(example.input_ids[1 : example.labels_start].tolist()).decode()
        == f"{rows.train[0].instruction} {rows.train[0].input} "
    )


@pytest.mark.parametrize(
    ("policy", "effect"),
    [("cut", "cuts away the whole answer"), ("drop", "with data.too_long=drop leaves nothing")],
)
def test_a_client_without_any_row_within_the_limit_is_named(policy, effect):
    config = DataConfig(clients=3, max_rows=30, template="alpaca", max_tokens=16, too_long=policy)
    rows = client_rows(config, 0)[2]
    said = f"data.max_tokens=16 {effect} of each of its 9 training rows .template alpaca.; raise data.max_tok"
    with pytest.raises(DataError, match=f"client 2: {said}"):
        encode_client(rows, byte_tokenizer(), config)
    with pytest.raises(DataError, match=f"public.jsonl: {said}"):
        encode_client(rows, byte_tokenizer(), config, owner="public.jsonl")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is absent")
def test_fed_gsm8k_3(monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(SHARED))
    config = DataConfig(task="gsm8k", clients=3)
    clients = client_rows(config, 0)
    assert [(len(of.train), len(of.val)) for of in clients] == [(2441, 50)] * 3
    data = encode_client(clients[0], byte_tokenizer(), config)
    text = byte_tokenizer().decode(data.val[0].input_ids)
    assert "### Input" not in text and "None" not in text and "\n\n### Response:" in text
    too_long = [
        row
        for row in clients[0].train + clients[0].val
        if 1 + len(prompt(row, "alpaca").encode()) >= config.max_tokens
    ]
    assert 0 < data.counts.lost == len(too_long)


def test_a_held_out_file_is_evaluated_once_in_all(tmp_path):
    """Clients hold out none of their own rows, whatever data.val_fraction is."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    path = write(tmp_path / "a", [{"instruction": str(i), "output": "a"} for i in range(30)])
    held_out = write(tmp_path / "b", [{"instruction": f"h{i}", "output": "a"} for i in range(100)])
    config = DataConfig(task="file", path=path, held_out=held_out, clients=3, max_rows=20, val_fraction=0.5)
    clients = client_rows(config, 0)
    assert sum(len(of.train) for of in clients) == 20
    assert [len(of.val) for of in clients] == [34, 33, 33]
    assert [of.val[1].instruction for of in clients] == ["h3", "h4", "h5"]
    assert len({row for of in clients for row in of.val}) == 100
    assert row_remarks(config, clients) == []
    data = encode_client(clients[0], byte_tokenizer(), config)
    assert (len(data.val), data.weight) == (34, 14.0)  # an answer has one byte and end-of-sequence


def test_remarks_on_a_held_out_file(tmp_path):
    rows = [{"instruction": str(i), "output": "a"} for i in range(30)]
    path = write(tmp_path, rows)
    (tmp_path / "held_out").mkdir()
    held_out = write(tmp_path / "held_out", [rows[0], {"instruction": "x", "output": "a"}])
    config = DataConfig(task="file", path=path, held_out=held_out, clients=3, val_fraction=0.0)
    without, copies = row_remarks(config, client_rows(config, 0))
    assert without.startswith("clients that evaluate no row, because data.held_out has fewer rows")
    assert copies.startswith("1 of 2 held-out rows are also training rows of a client")


def conversation(*contents) -> dict:
    roles = ("user", "assistant") * 9
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents)]}


def test_equal_conversations_are_held_out_together(tmp_path):
    """Whatever a weight says: it changes the loss, not what the model has read."""
    records = [conversation("a", str(i // 3), "b", "c") for i in range(30)]
    for record in records[::3]:
        record["messages"][1]["weight"] = 0
    config = DataConfig(task="file", path=write(tmp_path, records), clients=1, val_fraction=0.3)
    (client,) = client_rows(config, 0)
    first_answers = [[row.messages[1].content for row in rows] for rows in (client.train, client.val)]
    assert len(client.val) == 9 and set(first_answers[0]).isdisjoint(first_answers[1])


def test_remarks_on_conversations(tmp_path):
    records = [conversation("a", "b", "c", "d")] * 6 + [
        conversation("a", "", "c", "e"),
        conversation("x", "y"),
    ]
    config = DataConfig(task="file", path=write(tmp_path, records), clients=2, val_fraction=0)
    blank, copies = row_remarks(config, client_rows(config, 0))
    assert blank.startswith("1 of 8 rows have a blank answer")
    assert copies == "1 different rows are training rows of more than one client"


@pytest.fixture
def files(tmp_path):
    """Return a folder with a file of 4, one of 8 and one of 12 rows."""
    for number in (2, 10, 1):
        rows = [{"instruction": f"{number}-{i}", "output": "a"} for i in range(4 * min(number, 3))]
        (tmp_path / f"site{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize(
    ("names", "order"),
    [(("",), (1, 2, 10)), (("site*.jsonl",), (1, 2, 10)), (("site10.jsonl", "site1.jsonl"), (10, 1))],
)
def test_one_file_a_client(files, names, order):
    path = tuple(str(files / name) for name in names)
    config = DataConfig(task="file", path=path, clients=len(order), split="file", val_fraction=0.25)
    clients = client_rows(config, 0)
    for client, number in zip(clients, order):
        own = {row.instruction.partition("-")[0] for row in (*client.train, *client.val)}
        assert own == {str(number)} and client.source == str(files / f"site{number}.jsonl")
    assert [len(client.val) for client in clients] == [min(number, 3) for number in order]


def test_as_many_files_as_clients(files):
    config = DataConfig(task="file", path=str(files), clients=2, split="file")
    message = f"{files} has 3 files .*site1.jsonl, .*site10.jsonl. and data.clients=2; set data.clients=3"
    with pytest.raises(DataError, match=message):
        client_rows(config, 0)
    with pytest.raises(DataError, match="no row for client 0"):  # data.max_rows left none of that file
        client_rows(replace(config, clients=3, max_rows=3), 5)


def test_the_dry_run_names_files_and_keys_without_effect(files):
    held_out = files.parent / "held_out.jsonl"
    held_out.write_text('{"text": "t"}\n')
    settings = (
        f"model.base=gpt2 data.task=file data.split=file data.path={files} data.held_out={held_out} "
        "data.max_val_rows=3"
    )
    lines = preflight._data(load(None, settings.split()))
    assert lines[0] == "data     file: 3 clients, training + held-out rows 4+1, 8+0, 12+0"
    assert lines[1] == f"         client 0: {files / 'site1.jsonl'}"
    assert lines[4:] == [
        f"         held out: the rows of data.held_out={held_out}, each at one client",
        "note     data.max_val_rows: no effect, because data.held_out names the held-out rows",
    ]
