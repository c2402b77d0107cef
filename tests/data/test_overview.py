"""The overview of a split (`fedspeed data`), and the split as files."""

import json
from dataclasses import replace

import pytest

from fedspeed.data.clients import ClientRows, client_rows
from fedspeed.data.config import DataConfig
from fedspeed.data.copies import count_copies
from fedspeed.data.overview import overview
from fedspeed.data.prompt_template import template_for
from fedspeed.data.rows import Message, Row
from fedspeed.data.shown_tokens import segments, token_texts
from fedspeed.data.split_files import HELD_OUT, record, train_file, write_split
from fedspeed.errors import DataError
from fedspeed.models.tokenizer import byte_tokenizer
from fedspeed.monitor.plots import png
from fedspeed.monitor.split_plot import MAX_CATEGORIES, MAX_CLIENTS, split_figure
from fedspeed.monitor.split_text import split_text
from tests.data.chat_tokenizers import chat_tokenizer

TOKENIZER = byte_tokenizer()
PLAIN = DataConfig(template="plain", max_tokens=20)


def row(question, answer="b", category="c"):
    return Row(question, "", answer, category)


def test_lengths_are_those_before_truncation_and_lost_rows_are_counted():
    """Plain template: bos, question, space, answer, eos."""
    client = ClientRows((row("q" * 5), row("q" * 30), row("q" * 5, "a" * 30)), (row("q"),), 0)
    (view,) = overview(PLAIN, [client], TOKENIZER).clients
    assert (view.train, view.held_out, view.counts.cut, view.counts.lost) == (3, 1, 1, 1)
    assert view.lengths.tolist() == [9, 34, 38]
    assert view.quantiles == {"min": 9, "median": 34, "95 %": 38, "max": 38}


@pytest.mark.parametrize(
    "policy, counts, column",
    [("drop", (2, 0, 0, 2, 0), "dropped"), ("keep_end", (3, 0, 0, 1, 1), "end kept")],
)
def test_rows_that_are_dropped_or_lose_their_beginning_are_shown_as_that(policy, counts, column):
    client = ClientRows((row("q" * 5), row("q" * 30), row("q" * 5, "a" * 30)), (row("q"),), 0)
    view = overview(replace(PLAIN, too_long=policy), [client], TOKENIZER)
    (one,) = view.clients
    names = ("kept", "cut", "lost", "dropped", "kept_end")
    assert tuple(one.to_json()[name] for name in names) == counts
    assert tuple(view.to_json()[name] for name in names) == counts
    assert one.lengths.tolist() == [9, 34, 38]
    header, values = (line for line in split_text(view).splitlines() if line.startswith(("client", "     0")))
    assert column in header and values.split()[:7] == [
        "0",
        "3",
        "1",
        str(counts[0]),
        "0",
        "0",
        str(counts[3]),
    ]


def test_a_row_that_is_refused_is_named():
    rows = (row("q"), replace(row("q" * 30), where="x.jsonl:3"))
    with pytest.raises(DataError, match="^x.jsonl:3: the row has 34 tokens"):
        overview(replace(PLAIN, too_long="error"), [ClientRows(rows, (), 0)], TOKENIZER)


def test_a_client_without_a_row_to_show():
    text = split_text(overview(PLAIN, [ClientRows((row("q" * 30),), (), 4)], TOKENIZER))
    assert text.endswith("client 4 has no row to show: data.max_tokens takes all of them")


def test_quantiles_are_lengths_that_occur():
    client = ClientRows(tuple(row("q" * n) for n in range(1, 11)), (), 0)
    (view,) = overview(replace(PLAIN, max_tokens=512), [client], TOKENIZER).clients
    assert set(view.quantiles.values()) <= set(view.lengths.tolist())


def test_equal_rows_are_counted_over_all_clients_though_one_is_shown():
    clients = [
        ClientRows((row("x"), row("x"), row("y")), (row("z"),), 0),
        ClientRows((row("y"), row("z")), (row("w"),), 1),
    ]
    copies = count_copies(clients)
    assert (copies.within, copies.shared, copies.leaked, copies.held_out) == (1, 1, 1, 2)
    view = overview(PLAIN, clients, TOKENIZER, client=1)
    assert [client.client for client in view.clients] == [1] and view.copies == copies
    assert any("training rows of another client" in note for note in view.notes)


def test_the_example_is_what_the_model_is_trained_on():
    client = ClientRows((row("how", "so"),), (), 0)
    (view,) = overview(PLAIN, [client], TOKENIZER).clients
    prompt, answer = view.example
    assert not prompt.is_trained and answer.is_trained
    (example,) = template_for(PLAIN, TOKENIZER).encode(client.train[0]).examples
    assert len(answer.tokens) == int((example.labels != -100).sum())
    assert prompt.tokens[0] == "<bos>" and "".join(prompt.tokens[1:]).strip() == "how"
    assert "".join(answer.tokens) == "so<eos>"


def test_a_conversation_is_shown_with_a_segment_for_each_turn(tmp_path):
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chat = Row(
        "",
        "",
        "B",
        "",
        tuple(
            Message(role, text)
            for role, text in (("user", "a"), ("assistant", "A"), ("user", "b"), ("assistant", "B"))
        ),
    )
    config = DataConfig(template="chat", chat_template=str(tmp_path / "chat.jinja"), max_tokens=512)
    (example,) = template_for(config, TOKENIZER).encode(chat).examples
    shown = segments(example, TOKENIZER)
    assert [part.is_trained for part in shown][:4] == [False, True, False, True]
    assert sum(len(part.tokens) for part in shown) == len(example.input_ids)


def test_tokens_are_visible_text():
    """Control characters as escapes, a part of a character by its name in the vocabulary."""
    ids = TOKENIZER("\x1bé", add_special_tokens=False).input_ids
    escape, first, second = token_texts(ids, TOKENIZER)
    assert escape == "\\x1b" and "\ufffd" not in first + second and first and second


def test_the_split_as_files_is_read_back_as_it_was(tmp_path):
    config = DataConfig(clients=3, split="meta", max_rows=90)
    clients = client_rows(config, 0)
    paths = write_split(tmp_path / "split", clients)
    assert [path.name for path in paths] == [*(train_file(client) for client in range(3)), HELD_OUT]
    pattern = str(tmp_path / "split" / "train-client-*.jsonl")
    files = DataConfig(task="file", path=pattern, clients=1, held_out=str(tmp_path / "split" / HELD_OUT))
    (everything,) = client_rows(files, 0)
    assert everything.train == tuple(row for client in clients for row in client.train)
    assert everything.val == tuple(row for client in clients for row in client.val)
    (alone,) = client_rows(replace(files, path=str(tmp_path / "split" / train_file(1))), 0)
    assert alone.train == clients[1].train


@pytest.mark.parametrize(
    "one, expected",
    [
        (Row("", "", "whole", "", is_text=True), {"text": "whole"}),
        (
            Row("", "", "A", "k", (Message("user", "q"), Message("assistant", "A"))),
            {
                "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "A"}],
                "category": "k",
            },
        ),
    ],
)
def test_other_rows_keep_their_form_in_files(one, expected):
    assert record(one) == expected


def test_conversations_of_one_and_of_several_turns_are_one_file(tmp_path):
    """A chat template makes the same of them as before."""
    turns = (Message("user", "q"), Message("assistant", "A"), Message("user", "r"), Message("assistant", "B"))
    rows = (row("one"), Row("", "", "B", "c", turns), Row("i", "x", "o", "c"), Row("", "", "o", "c"))
    write_split(tmp_path, [ClientRows(rows, (), 0)])
    files = DataConfig(task="file", path=str(tmp_path / train_file(0)), clients=1, val_fraction=0)
    (back,) = client_rows(files, 0)
    assert back.train[:2] == rows[:2]
    template = template_for(files, chat_tokenizer("zephyr"))
    for one, other in zip(rows, back.train, strict=True):
        (expected,) = template.encode(one).examples
        (found,) = template.encode(other).examples
        assert found.input_ids.tolist() == expected.input_ids.tolist()
        assert found.labels.tolist() == expected.labels.tolist()


def test_rows_of_several_formats_are_not_written_to_one_file(tmp_path):
    rows = (row("one"), Row("", "", "whole", "", is_text=True))
    with pytest.raises(DataError, match=r"client-0.jsonl: its rows have several formats .instruction, text."):
        write_split(tmp_path / "split", [ClientRows(rows, (), 0)])
    assert not (tmp_path / "split").exists()


def test_a_folder_with_another_split_is_not_written_to(tmp_path):
    three = [ClientRows((row(str(i)),), (row("h"),), i) for i in range(3)]
    write_split(tmp_path, three)
    assert len(write_split(tmp_path, three)) == 4
    for fewer, name in ((three[:2], train_file(2)), ([replace(one, val=()) for one in three], HELD_OUT)):
        with pytest.raises(DataError, match=f"holds files of another split .{name}., .*another folder"):
            write_split(tmp_path, fewer)


def test_a_category_called_others_has_its_own_bar():
    names = ["others", *(f"c{i}" for i in range(MAX_CATEGORIES))]
    client = ClientRows(tuple(row(name, category=name) for name in names), (), 0)
    axes = split_figure(overview(PLAIN, [client], TOKENIZER), "many").axes[0]
    assert len(axes.containers) == MAX_CATEGORIES + 1
    assert sum(bar.get_width() for bars in axes.containers for bar in bars) == len(names)


def test_the_overview_as_text_json_and_figure():
    config = DataConfig(clients=MAX_CLIENTS + 1, max_tokens=64, max_rows=200)
    view = overview(config, client_rows(config, 0), TOKENIZER)
    text = split_text(view)
    assert "200 rows, all kept whole" in text and "example of client 0" in text
    assert json.loads(json.dumps(view.to_json()))["clients"][1]["client"] == 1
    figure = split_figure(view, "many")
    assert len(figure.axes[0].get_yticks()) == MAX_CLIENTS
    assert png(figure)[:4] == b"\x89PNG"
