"""Conversion of rows to token ids, with the loss on the answer only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fedspeed.data.rows import Row
from fedspeed.data.templates import prompt

IGNORED = -100  # the label that cross entropy skips


class Tokenizer(Protocol):
    """The members of a transformers tokenizer that are used here; it has end-of-sequence and pad tokens."""

    bos_token_id: int | None
    eos_token: str
    eos_token_id: int
    pad_token_id: int
    unk_token_id: int | None
    all_special_ids: list[int]
    chat_template: Any

    def __call__(self, text: str, **options: Any) -> Any: ...

    def convert_ids_to_tokens(self, ids: Any) -> Any: ...

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str: ...


@dataclass(frozen=True, eq=False)
class Example:
    """One encoded row.

    Attributes:
        input_ids: [T] int32, prompt, answer and end-of-sequence, truncated to the token limit.
        labels_start: index of the first answer token; tokens before it carry no loss.
        cut: whether the end of the answer was truncated. Such a row cannot be answered exactly.
    """

    input_ids: np.ndarray
    labels_start: int
    cut: bool = False

    @property
    def answer_tokens(self) -> int:
        """Return the number of tokens that carry loss. The first token of a sequence is never predicted."""
        return len(self.input_ids) - max(self.labels_start, 1)

    @property
    def labels(self) -> np.ndarray:
        """Return the labels, [T] int64: the ids of the answer, and -100 on the prompt."""
        labels = self.input_ids.astype(np.int64)
        labels[: self.labels_start] = IGNORED
        return labels


def encode(row: Row, tokenizer: Tokenizer, template: str, max_tokens: int) -> Example | None:
    """Return prompt, answer and end-of-sequence of a row as token ids, truncated to `max_tokens`.

    Prompt and answer are tokenized separately, so that the prompt's ids are the same in training and in
    generation whatever the answer begins with; a token across the boundary would change them.

    Returns:
        None where no answer token is left: such a row has no loss, and its mean loss would be 0/0.
    """
    before = prompt_ids(row, tokenizer, template)
    ids = before + text_ids(row.output, tokenizer) + [tokenizer.eos_token_id]
    example = Example(np.asarray(ids[:max_tokens], dtype=np.int32), len(before), cut=len(ids) > max_tokens)
    return example if example.answer_tokens > 0 else None


def prompt_ids(row: Row, tokenizer: Tokenizer, template: str) -> list[int]:
    """Return the token ids of everything before the answer, the same in training and in generation."""
    return prompt_text_ids(prompt(row, template), tokenizer)


def prompt_text_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of a prompt given as text, with the tokens that precede every prompt."""
    return leading_special_ids(tokenizer) + text_ids(text, tokenizer)


def leading_special_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that the tokenizer itself puts before a text: [bos] for Llama, none for GPT-2."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []


def text_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of a text without special tokens. Where the text has the name of one, such as
    `</s>`, the name is encoded as characters; as a special token it would end an answer in the middle.
    """
    # Not verbose: otherwise the tokenizer warns of texts longer than the model's positions, which `encode`
    # truncates.
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    # The vocabulary of a Unigram tokenizer may have such names as ordinary pieces.
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    if special.isdisjoint(ids):
        return ids
    return [piece for token in ids for piece in (_spelled(tokenizer, token) if token in special else [token])]


def _spelled(tokenizer: Tokenizer, token: int) -> list[int]:
    """Return the ids of the characters of a token's name."""
    return tokenizer.convert_tokens_to_ids(list(tokenizer.convert_ids_to_tokens(token)))
