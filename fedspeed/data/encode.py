"""From a row to token ids, with the loss on the answer only."""

from dataclasses import dataclass

import numpy as np

from fedspeed.data.rows import Row
from fedspeed.data.templates import prompt

IGNORED = -100  # the label that cross entropy skips


@dataclass(frozen=True, eq=False)
class Example:
    """One encoded row.

    Attributes:
        input_ids: [T] int32, prompt then answer then end-of-sequence, cut to the token limit.
        labels_start: position of the first answer token; everything before it carries no loss.
        cut: whether the token limit took the end of the answer away. Nobody can answer such a row exactly.
    """

    input_ids: np.ndarray
    labels_start: int
    cut: bool = False

    @property
    def answer_tokens(self) -> int:
        """Tokens that carry loss. The very first token of a sequence is never predicted, so it never
        counts.
        """
        return len(self.input_ids) - max(self.labels_start, 1)

    @property
    def labels(self) -> np.ndarray:
        """[T] int64: the ids of the answer, -100 on the prompt."""
        labels = self.input_ids.astype(np.int64)
        labels[: self.labels_start] = IGNORED
        return labels


def encode(row: Row, tokenizer, template: str, max_tokens: int) -> Example | None:
    """Token ids of prompt + answer + end-of-sequence, cut to `max_tokens`.

    Prompt and answer are tokenized apart, so the prompt's ids are the same at training and at generation
    whatever the answer begins with (a merge across the boundary would change them).

    Returns:
        None where the cut leaves no answer token: such a row has no loss, and its mean would be 0/0.
    """
    before = prompt_ids(row, tokenizer, template)
    ids = before + text_ids(row.output, tokenizer) + [tokenizer.eos_token_id]
    example = Example(np.asarray(ids[:max_tokens], dtype=np.int32), len(before), cut=len(ids) > max_tokens)
    return example if example.answer_tokens > 0 else None


def prompt_ids(row: Row, tokenizer, template: str) -> list[int]:
    """Token ids of all that stands before the answer, the same in training and when a model is asked."""
    return asked_ids(prompt(row, template), tokenizer)


def asked_ids(text: str, tokenizer) -> list[int]:
    """Token ids of a prompt that is already text."""
    return leading_special_ids(tokenizer) + text_ids(text, tokenizer)


def leading_special_ids(tokenizer) -> list[int]:
    """What the tokenizer itself puts in front of a text: [bos] for Llama, nothing for GPT-2 and Qwen2."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []


def text_ids(text: str, tokenizer) -> list[int]:
    """Token ids of a text as text: where it holds the name of a special token, such as `</s>`, the name is
    spelled out. Read as the token itself, it would end an answer in the middle.
    """
    # Not verbose: the tokenizer would warn of texts beyond the model's positions, and `encode` cuts them
    # right after.
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    # The pieces of a Unigram vocabulary may hold such names themselves.
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    if special.isdisjoint(ids):
        return ids
    return [piece for token in ids for piece in (_spelled(tokenizer, token) if token in special else [token])]


def _spelled(tokenizer, token: int) -> list[int]:
    """A token's name, character by character."""
    return tokenizer.convert_tokens_to_ids(list(tokenizer.convert_ids_to_tokens(token)))
