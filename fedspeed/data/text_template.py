"""Prompt templates that are a text with the instruction and the input of a row in it."""

import numpy as np

from fedspeed.data.base_template import PromptTemplate
from fedspeed.data.encode import Encoded, Example, Tokenizer, prompt_text_ids, text_ids
from fedspeed.data.rows import Row
from fedspeed.data.templates import prompt


class TextTemplate(PromptTemplate):
    """A template of `data.templates`: the tokenizer's leading token, prompt, answer, end-of-sequence.

    Prompt and answer are tokenized separately, so that the prompt's ids are the same in training and in
    generation whatever the answer begins with; a token across the boundary would change them.

    Args:
        name: of the template. tokenizer: of the run. max_tokens: limit of an example.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, max_tokens: int):
        self.name = name
        self.stop_ids = frozenset([tokenizer.eos_token_id])
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens

    def prompt_text(self, row: Row) -> str:
        return prompt(row, self.name)

    def prompt_ids(self, row: Row) -> list[int]:
        return prompt_text_ids(self.prompt_text(row), self._tokenizer)

    def encode(self, row: Row) -> Encoded:
        before = self.prompt_ids(row)
        ids = before + text_ids(row.output, self._tokenizer) + [self._tokenizer.eos_token_id]
        cut = len(ids) > self._max_tokens
        example = Example(np.asarray(ids[: self._max_tokens], dtype=np.int32), len(before), cut=cut)
        return Encoded((example,), cut=cut) if example.answer_tokens > 0 else Encoded(())
