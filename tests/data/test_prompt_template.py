"""The choice of the template, rows that a template cannot express, rows without a prompt; data.too_long."""

from dataclasses import replace

import pytest

from fedspeed.data.clients import ClientRows, client_rows, encode_client
from fedspeed.data.config import DataConfig
from fedspeed.data.prompt_format import format_of, with_template
from fedspeed.data.prompt_template import template_for
from fedspeed.data.row_counts import RowCounts, RowTable
from fedspeed.data.rows import Message, Row
from fedspeed.errors import DataError
from fedspeed.models.config import ModelConfig
from fedspeed.models.tokenizer import byte_tokenizer, load_tokenizer
from tests.data.chat_tokenizers import FAMILIES, FOLDER, chat_tokenizer
from tests.smollm2 import smollm2

FILE = DataConfig(task="file", path="rows.jsonl")
ROW = Row("say", "", "yes", "")
COMPLETION = Row("say", "", "yes", "", is_completion=True)
TEXT = Row("", "", "a whole text</s>", "", is_text=True)


def conversation(*turns: tuple[str, str]) -> Row:
    return Row("", "", turns[-1][1], "", tuple(Message(*turn) for turn in turns))


def ids(row, template) -> list[int]:
    (example,) = template.encode(row).examples
    return example.input_ids.tolist()


def test_auto_is_chat_where_there_is_a_chat_template():
    assert template_for(FILE, chat_tokenizer("zephyr")).name == "chat"
    assert template_for(FILE, byte_tokenizer()).name == "alpaca"
    assert template_for(DataConfig(), chat_tokenizer("zephyr")).name == "plain"
    from_file = replace(FILE, chat_template=str(FOLDER / "zephyr.jinja"))
    assert template_for(from_file, byte_tokenizer()).prompt_text(ROW) == "<|user|>\nsay<eos>\n<|assistant|>\n"


def test_a_completion_and_a_text_have_no_template():
    template = template_for(FILE, chat_tokenizer("llama3"))
    none = template_for(replace(FILE, template="none"), chat_tokenizer("llama3"))
    assert template.prompt_text(COMPLETION) == none.prompt_text(ROW) == "say"
    assert ids(COMPLETION, template) == ids(ROW, none)
    assert template.encode(ROW).examples[0].labels_start > none.encode(ROW).examples[0].labels_start == 3
    for name in ("auto", "chat", "alpaca", "plain", "none"):
        text = template_for(replace(FILE, template=name), byte_tokenizer_with_template())
        (example,) = text.encode(TEXT).examples
        assert example.input_ids.tolist() == [257, *b"a whole text</s>", 258]
        assert (example.labels_start, text.prompt_ids(TEXT), text.prompt_text(TEXT)) == (1, [257], "")


def byte_tokenizer_with_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (FOLDER / "zephyr.jinja").read_text()
    return tokenizer


def test_the_card_of_a_run_on_completions_names_no_template():
    tokenizer = chat_tokenizer("zephyr")
    assert format_of(tokenizer, with_template(FILE, [COMPLETION, TEXT])).template == "none"
    assert format_of(tokenizer, with_template(FILE, [COMPLETION, ROW])).template == "chat"
    assert format_of(tokenizer, with_template(FILE, [])).template == "chat"


def test_of_several_chat_templates_the_default_one_is_used():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"tool_use": "x", "default": (FOLDER / "zephyr.jinja").read_text()}
    assert template_for(FILE, tokenizer).prompt_text(ROW).startswith("<|user|>")
    tokenizer.chat_template = {"tool_use": "x", "rag": "y"}
    with pytest.raises(
        DataError, match=r"several chat templates \(rag, tool_use\) and none is called default"
    ):
        template_for(FILE, tokenizer)


def test_the_system_prompt_is_for_conversations_without_one():
    template = template_for(replace(FILE, system_prompt="Be brief"), chat_tokenizer("smollm2"))
    assert template.prompt_text(ROW).startswith("<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user")
    own = conversation(("system", "Be long"), ("user", "a"), ("assistant", "b"))
    assert "Be brief" not in template.prompt_text(own)
    with pytest.raises(
        DataError, match="data.system_prompt: template alpaca has no form for a system message"
    ):
        template_for(replace(FILE, system_prompt="Be brief"), byte_tokenizer())


@pytest.mark.parametrize("name", ["alpaca", "plain", "none"])
def test_a_conversation_needs_a_chat_template(name):
    template = template_for(replace(FILE, template=name), byte_tokenizer())
    one = conversation(("user", "say"), ("assistant", "yes"))
    assert ids(one, template) == ids(ROW, template)
    two = conversation(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    with pytest.raises(
        DataError, match="no form for a conversation of user assistant user assistant; choose"
    ):
        template.encode(two)


def test_a_row_that_the_template_refuses_is_named():
    rows = (
        ROW,
        replace(conversation(("assistant", "a"), ("user", "b"), ("assistant", "c")), where="x.jsonl:7"),
    )
    expected = (
        "^x.jsonl:7: the tokenizer's chat template refuses a conversation of assistant user.*must alternate"
    )
    with pytest.raises(DataError, match=expected):
        encode_client(ClientRows(rows, (), 0), chat_tokenizer("gemma"), FILE)


def test_rows_of_a_file_know_their_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n\n{"instruction": "c", "output": "d"}\n')
    (rows,) = client_rows(DataConfig(task="file", path=str(path), clients=1, val_fraction=0), 0)
    assert [row.where for row in rows.train] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(
    ("jinja", "said"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "writes no special token behind an answer"),
        ("{{ messages[0].content }}", "does not write an answer once"),
        ("{% if %}", "refuses a conversation of user"),
        ("{{ strftime_now(x) }}", "writes today's date in a form that is computed"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused(tmp_path, jinja, said):
    (tmp_path / "own.jinja").write_text(jinja)
    with pytest.raises(DataError, match=f"data.chat_template={tmp_path}/own.jinja:? {said}"):
        template_for(replace(FILE, chat_template=str(tmp_path / "own.jinja")), byte_tokenizer())


def test_a_template_that_is_not_there_is_refused():
    with pytest.raises(DataError, match="data.chat_template=gone.jinja: cannot be read .No such file"):
        template_for(replace(FILE, chat_template="gone.jinja"), byte_tokenizer())
    with pytest.raises(DataError, match="data.template=chat: the tokenizer has no chat template; choose"):
        template_for(replace(FILE, template="chat"), byte_tokenizer())


PLAIN = DataConfig(template="plain", max_tokens=10)
LONG = Row("0123456789", "", "ab", "")  # with bos, space and eos 15 tokens


@pytest.mark.parametrize(
    ("policy", "row", "expected"),
    [
        ("cut", Row("012345", "", "abcd", ""), [257, *b"012345 ", *b"ab"]),
        ("cut", LONG, None),
        ("drop", LONG, None),
        ("keep_end", LONG, [257, *b"56789 ab", 258]),
        ("keep_end", Row("x", "", "1234567890", ""), None),
        ("keep_end", Row("x", "", "12345678", ""), [257, *b"12345678", 258]),
        ("keep_end", replace(TEXT, output="0123456789"), [257, *b"012345678"]),
    ],
)
def test_what_is_too_long(policy, row, expected):
    encoded = template_for(replace(PLAIN, too_long=policy), byte_tokenizer()).encode(row)
    if expected is None:
        assert encoded.examples == () and encoded.dropped == (policy != "cut")
        return
    (example,) = encoded.examples
    assert example.input_ids.tolist() == expected
    is_cut = policy == "cut" or row.is_text
    assert (encoded.cut, encoded.kept_end, example.cut) == (is_cut, not is_cut, is_cut)


def test_a_row_that_must_not_be_too_long_is_refused():
    config = replace(PLAIN, too_long="error")
    rows = ClientRows((replace(LONG, where="x.jsonl:3"),), (), 0)
    with pytest.raises(
        DataError, match="^x.jsonl:3: the row has 15 tokens, more than data.max_tokens=10; raise"
    ):
        encode_client(rows, byte_tokenizer(), config)


def test_a_conversation_is_cut_at_its_end():
    tokenizer = chat_tokenizer("llama3")
    row = conversation(("user", "a"), ("assistant", "b"), ("user", "c" * 40), ("assistant", "d"))
    whole = template_for(FILE, tokenizer).encode(row).examples[0]
    limit = whole.later_prompts[0][1] - 3
    for policy in ("cut", "keep_end"):
        encoded = template_for(replace(FILE, max_tokens=limit, too_long=policy), tokenizer).encode(row)
        (example,) = encoded.examples
        assert encoded.cut and example.input_ids.tolist() == whole.input_ids[:limit].tolist()
        assert example.answer_tokens == (example.labels != -100).sum() == 2
    dropped = template_for(replace(FILE, max_tokens=limit, too_long="drop"), tokenizer).encode(row)
    assert dropped.dropped


def test_a_single_question_keeps_its_end_in_a_chat_template():
    tokenizer = chat_tokenizer("llama3")
    row = Row("c" * 60, "", "d", "")
    whole = template_for(FILE, tokenizer).encode(row).examples[0].input_ids.tolist()
    config = replace(FILE, max_tokens=20, too_long="keep_end")
    assert ids(row, template_for(config, tokenizer)) == [whole[0], *whole[-19:]]


def test_line_end_behind_the_last_answer_is_not_counted_as_length():
    tokenizer = chat_tokenizer("zephyr")
    whole = ids(ROW, template_for(FILE, tokenizer))
    encoded = template_for(replace(FILE, max_tokens=len(whole) - 1, too_long="drop"), tokenizer).encode(ROW)
    assert not encoded.dropped and not encoded.cut and encoded.examples[0].input_ids.tolist() == whole[:-1]


def test_dropped_rows_and_ends_are_counted_and_printed():
    rows = ClientRows((LONG, LONG, Row("x", "", "1234567890", ""), ROW), (), 0)
    counts = encode_client(rows, byte_tokenizer(), replace(PLAIN, too_long="keep_end")).counts
    assert counts == RowCounts(4, cut=0, lost=0, dropped=1, kept_end=2)
    table = RowTable.of([counts], 10)
    assert table.line().startswith("4 rows: 3 kept, 0 of them cut")
    assert ", 2 with the end of the prompt only; 0 lost" in table.line()
    assert table.line().endswith("; 1 dropped as too long")
    assert table.warnings()[0].startswith("data.max_tokens=10 takes 1 of 4 rows (25.0 %) as a whole")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_code_on_a_card_makes_the_prompt_of_the_training(family):
    tokenizer = chat_tokenizer(family)
    format = format_of(tokenizer, FILE)
    uses_messages = family not in ("deepseek_r1", "chatml_without_prompt")
    assert bool(format.chat.messages) == uses_messages
    assert FAMILIES[family].turn_end in format.to_markdown()


def test_the_real_tokenizer():
    tokenizer = load_tokenizer(ModelConfig(base=str(smollm2())))
    template = template_for(FILE, tokenizer)
    row = conversation(
        ("user", "a <|im_end|>"), ("assistant", "\n b🙂"), ("user", "c"), ("assistant", "<|im_start|>d\n")
    )
    (example,) = template.encode(row).examples
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    control = [token for token in example.input_ids.tolist() if token in (start, end)]
    assert control == [start, end] * 5  # a system message is added
    messages = [{"role": m.role, "content": m.content} for m in row.messages]
    assert tokenizer.decode(example.input_ids.tolist()) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )
    clean = conversation(*((m.role, m.content.replace("<|im_", "")) for m in row.messages))
    messages = [{"role": m.role, "content": m.content} for m in clean.messages]
    assert ids(clean, template) == tokenizer.apply_chat_template(messages, return_dict=False)
