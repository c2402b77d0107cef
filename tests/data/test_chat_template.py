"""Chat templates of known model families: token ids equal to apply_chat_template, and the loss on each answer
and its end-of-turn token only.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspeed.data.chat_rendering import DATE
from fedspeed.data.config import DataConfig
from fedspeed.data.prompt_template import template_for
from fedspeed.data.rows import Message, Row
from fedspeed.errors import DataError
from tests.data.chat_tokenizers import FAMILIES, chat_tokenizer

ROLES = {"s": "system", "u": "user", "a": "assistant"}
CONFIG = DataConfig(task="file", max_tokens=4096)
TEMPLATES = {family: template_for(CONFIG, chat_tokenizer(family)) for family in FAMILIES}
TURNS = ("u Hello", "a \n\nYes.", "u  and\n\nHi\n", "a Hi\n\n\n", "u x 🙂é", "a so\n")


def conversation(*turns: str) -> Row:
    """Return a row of messages that begin with the first letter of their role."""
    messages = tuple(Message(ROLES[turn[0]], turn[2:]) for turn in turns)
    return Row("", "", messages[-1].content, "", messages)


def applied(tokenizer, messages, jinja=None, **options) -> list[int]:
    """Return the ids of apply_chat_template."""
    return tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages],
        chat_template=jinja,
        tokenize=True,
        return_dict=False,
        date_string=DATE.strftime("%d %b %Y"),
        **options,
    )


def trained_texts(tokenizer, example) -> list[str]:
    """Return the text of each run of tokens with a loss."""
    labels = example.labels
    runs = np.split(np.arange(len(labels)), np.flatnonzero(np.diff(labels != -100)) + 1)
    return [tokenizer.decode(labels[run].tolist()) for run in runs if labels[run[0]] != -100]


@pytest.mark.parametrize("turns", [2, 6])
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_tokenizer(family, system, turns):
    tokenizer = chat_tokenizer(family)
    row = conversation(*(["s Be\nbrief "] if system else []), *TURNS[:turns])
    template = TEMPLATES[family]
    if system and "system" in FAMILIES[family].refuses:
        with pytest.raises(
            DataError, match="refuses .* System role not supported; leave out data.system_prompt"
        ):
            template.encode(row)
        return
    examples = template.encode(row).examples
    ends = [i + 1 for i, message in enumerate(row.messages) if message.role == "assistant"]
    if family == "mistral" and system:
        # It writes the system message only where a question is last.
        expected = [
            applied(tokenizer, row.messages[: end - 1])
            + applied(tokenizer, [Message("user", "x"), row.messages[end - 1]])[
                len(applied(tokenizer, [Message("user", "x")])) :
            ]
            for end in ends
        ]
    else:
        expected = [
            applied(tokenizer, row.messages[:end])
            for end in (ends if FAMILIES[family].is_split else ends[-1:])
        ]
    assert [example.input_ids.tolist() for example in examples] == expected


# What the model has to write for the answers of TURNS; spaces around an answer are the template's choice.
ANSWERS = {
    "llama3": ["Yes.", "Hi", "so"],
    "gemma": ["Yes.", "Hi", "so"],
    "mistral": [" Yes.", " Hi", " so"],
    "phi3": ["Yes.", "Hi\n\n\n", "so\n"],  # its special tokens take the space behind them
    "qwen3": [f"<think>\n\n</think>\n\n{text}" for text in ("Yes.", "Hi\n\n\n", "so\n")],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_on_each_answer_and_its_end(family):
    tokenizer = chat_tokenizer(family)
    examples = TEMPLATES[family].encode(conversation(*TURNS)).examples
    trained = [text for example in examples for text in trained_texts(tokenizer, example)]
    answers = ANSWERS.get(family, ["\n\nYes.", "Hi\n\n\n", "so\n"])
    assert len(trained) == 3
    for text, answer in zip(trained, answers):
        # A token that reaches over the border begins with the end of the template's text.
        before, found, after = text.partition(answer + FAMILIES[family].turn_end)
        assert found and before in ("", "\n", "\n\n", ">\n") and after == ""
    assert sum(example.answer_tokens for example in examples) == sum(
        (example.labels != -100).sum() for example in examples
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_is_the_beginning_of_the_example(family):
    """Of an answer that begins with a letter, which no token connects with the prompt's end."""
    tokenizer = chat_tokenizer(family)
    template = TEMPLATES[family]
    row = Row("What\n", "is 2?", "Zwei.", "")
    (example,) = template.encode(row).examples
    prompt = template.prompt_ids(row)
    assert prompt == example.input_ids[: example.labels_start].tolist()
    if family != "phi3":
        assert tokenizer.decode(prompt) == template.prompt_text(row)
    if family not in ("deepseek_r1", "chatml_without_prompt"):
        assert prompt == applied(tokenizer, [Message("user", "What\n\n\nis 2?")], add_generation_prompt=True)
    end = tokenizer.convert_tokens_to_ids(FAMILIES[family].turn_end)
    assert template.stop_ids == {end, tokenizer.eos_token_id}
    assert example.labels[example.labels != -100][-1] == end


def test_a_prompt_without_generation_prompt_and_one_with_too_much_of_it():
    chatml = TEMPLATES["chatml_without_prompt"]
    assert chatml.prompt_text(Row("a", "", "b", "")).endswith("a<|im_end|>\n<|im_start|>assistant\n")
    deepseek = TEMPLATES["deepseek_r1"]
    assert deepseek.prompt_text(Row("a", "", "b", "")).endswith("a<｜Assistant｜>")
    assert "ends a prompt with '<think>\\n'" in deepseek.notes[0]


def test_reasoning_is_trained_on_where_the_template_keeps_it():
    tokenizer = chat_tokenizer("qwen3")
    row = conversation("u a", "a <think>\nhm\n</think>\n\nb", "u c", "a <think>\nso\n</think>\n\nd")
    examples = template_for(CONFIG, tokenizer).encode(row).examples
    assert [trained_texts(tokenizer, example) for example in examples] == [
        ["<think>\nhm\n</think>\n\nb<|im_end|>"],
        ["<think>\nso\n</think>\n\nd<|im_end|>"],
    ]
    assert "hm" not in tokenizer.decode(examples[1].input_ids.tolist())


def test_a_turn_that_is_not_trained_carries_no_loss():
    tokenizer = chat_tokenizer("smollm2")
    row = conversation(*TURNS)
    row = replace(row, messages=tuple(replace(m, trained=m.content != "Hi\n\n\n") for m in row.messages))
    (example,) = template_for(CONFIG, tokenizer).encode(row).examples
    assert len(trained_texts(tokenizer, example)) == 2
    assert example.input_ids.tolist() == applied(tokenizer, row.messages)


def spelled(tokenizer, name) -> list[int]:
    return tokenizer(name, add_special_tokens=False, split_special_tokens=True).input_ids


PIECES = ["\n", " ", "\n\n", "  ", "🙂", "é", "Yes", "<|im_", "end|>", "</", "s>", "Hello"]


@st.composite
def contents(draw, names):
    """Draw a message of special tokens' names, parts of them, spaces and other characters."""
    characters = st.text(st.characters(exclude_categories=("Cs", "Co")), max_size=4)
    pieces = draw(st.lists(st.one_of(st.sampled_from([*names, *PIECES]), characters), min_size=1, max_size=6))
    return "x" + "".join(pieces) if not "".join(pieces).strip() else "".join(pieces)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_names_of_special_tokens_are_text(family, data):
    """All else is as apply_chat_template has it: a name in a message is one special token there, and in its
    place are the name's characters.
    """
    tokenizer = chat_tokenizer(family)
    names = list(dict.fromkeys([*tokenizer.all_special_tokens, FAMILIES[family].turn_end]))
    messages = [Message(role, data.draw(contents(names))) for role in ("user", "assistant") * 2]
    examples = TEMPLATES[family].encode(Row("", "", messages[-1].content, "", tuple(messages))).examples
    ids = examples[-1].input_ids.tolist()
    control = set(tokenizer.convert_tokens_to_ids(names))
    bare = applied(tokenizer, [Message(m.role, "x") for m in messages])
    assert [i for i in ids if i in control] == [i for i in bare if i in control]
    parsed = applied(tokenizer, messages)
    if family != "phi3":  # its special tokens take the space behind them, which is spelled out with the name
        spellings = {tokenizer.convert_tokens_to_ids(name): spelled(tokenizer, name) for name in names}
        assert matches(ids, parsed, spellings)
    if not any(name in m.content for name in names for m in messages):
        assert ids == parsed
    assert all(len(trained_texts(tokenizer, example)) == 2 // len(examples) for example in examples)


def matches(ids, parsed, spellings) -> bool:
    """Return whether `ids` is `parsed` with some special tokens spelled out."""
    i = 0
    for token in parsed:
        if i < len(ids) and ids[i] == token:
            i += 1
        elif token in spellings and ids[i : i + len(spellings[token])] == spellings[token]:
            i += len(spellings[token])
        else:
            return False
    return i == len(ids)
