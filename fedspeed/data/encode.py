"""Token ids of texts, and examples: token ids with the loss on some of them only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

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
        later_prompts: spans [start, end) behind labels_start that carry no loss either, in order: of a
            conversation, everything between two answers. They lie within input_ids.
    """

    input_ids: np.ndarray
    labels_start: int
    cut: bool = False
    later_prompts: tuple[tuple[int, int], ...] = ()

    @property
    def answer_tokens(self) -> int:
        """Return the number of tokens that carry loss. The first token of a sequence is never predicted."""
        without_loss = max(self.labels_start, 1) + sum(end - start for start, end in self.later_prompts)
        return len(self.input_ids) - without_loss

    @property
    def labels(self) -> np.ndarray:
        """Return the labels, [T] int64: the ids of the answers, and -100 on all other tokens."""
        labels = self.input_ids.astype(np.int64)
        for start, end in ((0, self.labels_start), *self.later_prompts):
            labels[start:end] = IGNORED
        return labels


@dataclass(frozen=True, eq=False)
class Encoded:
    """The examples of one row; none where nothing of its answers is left within the token limit.

    Attributes:
        cut: whether data.max_tokens removes the end of an answer, or a whole answer of several.
        dropped: whether the row is left out because data.too_long does not cut its answer.
        kept_end: whether the beginning of its prompt is removed.
    """

    examples: tuple[Example, ...]
    cut: bool = False
    dropped: bool = False
    kept_end: bool = False


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
    # Not verbose: otherwise the tokenizer warns of texts longer than the model's positions, which are
    # truncated later.
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    # The vocabulary of a Unigram tokenizer may have such names as ordinary pieces.
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    if special.isdisjoint(ids):
        return ids
    return [piece for token in ids for piece in (_spelled(tokenizer, token) if token in special else [token])]


def _spelled(tokenizer: Tokenizer, token: int) -> list[int]:
    """Return the ids of the characters of a token's name."""
    return tokenizer.convert_tokens_to_ids(list(tokenizer.convert_ids_to_tokens(token)))
