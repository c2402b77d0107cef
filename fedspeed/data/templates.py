"""Prompt templates: the text before the answer of a row."""

from collections.abc import Hashable

from fedspeed.data.rows import Row

# The prompts of Stanford Alpaca (Taori et al. 2023), which FederatedScope-LLM trains and evaluates with.
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def _alpaca(row: Row) -> str:
    # A row without an input has no Input section. (FederatedScope-LLM has one with the text "None" there.)
    return (_ALPACA_WITH_INPUT if row.input else _ALPACA).format(instruction=row.instruction, input=row.input)


def _plain(row: Row) -> str:
    return " ".join(text for text in (row.instruction, row.input) if text) + " "


def _none(row: Row) -> str:
    return "\n".join(text for text in (row.instruction, row.input) if text)


_TEMPLATES = {"alpaca": _alpaca, "plain": _plain, "none": _none}


def prompt(row: Row, template: str) -> str:
    """Return the text before the answer of `row`; the answer follows without a separator.

    Args:
        template: "alpaca"; "plain" (instruction, input if there is one, each followed by one space); or
            "none" (instruction, and on the next line the input if there is one).
    """
    return _TEMPLATES[template](row)


def text_of(row: Row) -> Hashable:
    """Return what all templates make the same tokens of: rows with equal texts are equal to a model."""
    question = " ".join(text for text in (row.instruction, row.input) if text)
    return question, row.output, tuple((message.role, message.content) for message in row.messages)
