"""Prompt templates that are a text with the instruction and the input of a row in it."""

import numpy as np

from fedspeed.data.base_template import PromptTemplate
from fedspeed.data.config import DataConfig
from fedspeed.data.encode import Encoded, Example, Tokenizer, leading_special_ids, prompt_text_ids, text_ids
from fedspeed.data.rows import Row
from fedspeed.data.templates import prompt
from fedspeed.data.too_long import shortened
from fedspeed.errors import DataError


class TextTemplate(PromptTemplate):
    """A template of `data.templates`: the tokenizer's leading token, prompt, answer, end-of-sequence.

    Prompt and answer are tokenized separately, so that the prompt's ids are the same in training and in
    generation whatever the answer begins with; a token across the boundary would change them.

    Args:
        name: of the template. tokenizer: of the run. config: for data.max_tokens and data.too_long.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, config: DataConfig):
        self.name = name
        self.stop_ids = frozenset([tokenizer.eos_token_id])
        self._tokenizer = tokenizer
        self._config = config

    def prompt_text(self, row: Row) -> str:
        return "" if row.is_text else prompt(self._single_turn(row), self.name)

    def prompt_ids(self, row: Row) -> list[int]:
        return prompt_text_ids(self.prompt_text(row), self._tokenizer)

    def encode(self, row: Row) -> Encoded:
        if row.is_text:
            return encode_text(row, self._tokenizer, self._config)
        before = self.prompt_ids(row)
        return shortened([_example(before, row.output, self._tokenizer)], self._config, self._tokenizer)

    def _single_turn(self, row: Row) -> Row:
        """Return a conversation of one question, and its answer if it has one, as instruction and answer."""
        if not row.messages:
            return row
        roles = [message.role for message in row.messages]
        if roles not in (["user"], ["user", "assistant"]):
            raise DataError(
                f"data.template={self.name} has no form for a conversation of {' '.join(roles)}; choose "
                "data.template=chat, with data.chat_template if the tokenizer has no chat template"
            )
        return Row(row.messages[0].content, "", row.output, row.category)


def encode_text(row: Row, tokenizer: Tokenizer, config: DataConfig) -> Encoded:
    """Return the example of a text without a prompt: the tokenizer's leading token, the text and
    end-of-sequence, all of the text with a loss.
    """
    leading = leading_special_ids(tokenizer)
    return shortened([_example(leading, row.output, tokenizer)], config, tokenizer)


def _example(before: list[int], answer: str, tokenizer: Tokenizer) -> Example:
    ids = before + text_ids(answer, tokenizer) + [tokenizer.eos_token_id]
    return Example(np.asarray(ids, dtype=np.int32), len(before))
