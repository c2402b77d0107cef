"""How a row is put to the model: the text in front of the answer."""

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
    # A row without an input has no Input section at all. (FederatedScope-LLM asks the model to read "None"
    # there.)
    return (_ALPACA_WITH_INPUT if row.input else _ALPACA).format(instruction=row.instruction, input=row.input)


def _plain(row: Row) -> str:
    return " ".join(part for part in (row.instruction, row.input) if part) + " "


_TEMPLATES = {"alpaca": _alpaca, "plain": _plain}


def prompt(row: Row, template: str) -> str:
    """The text that the answer of `row` follows without any further separator.

    Args:
        template: "alpaca", or "plain" (instruction, input if there is one, each followed by one space).
    """
    return _TEMPLATES[template](row)


def text_of(row: Row, template: str) -> tuple[str, str]:
    """(prompt, answer): all that a model is shown of a row, so that rows with the same text are the same to
    it.
    """
    return prompt(row, template), row.output
