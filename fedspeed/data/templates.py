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
    return question(row, " ") + " "


def _none(row: Row) -> str:
    return question(row, "\n")


_TEMPLATES = {"alpaca": _alpaca, "plain": _plain, "none": _none}


def prompt(row: Row, template: str) -> str:
    """Return the text before the answer of `row`; the answer follows without a separator.

    Args:
        template: "alpaca"; "plain" (instruction, input if there is one, each followed by one space); or
            "none" (instruction, and on the next line the input if there is one).
    """
    return _TEMPLATES[template](row)


def question(row: Row, between: str) -> str:
    """Return the instruction of a row and its input, if it has one, with a text between them."""
    return between.join(text for text in (row.instruction, row.input) if text)


def text_of(row: Row) -> Hashable:
    """Return what rows are compared by: those with equal texts count as equal, whatever their category."""
    return question(row, " "), row.output, tuple((message.role, message.content) for message in row.messages)
