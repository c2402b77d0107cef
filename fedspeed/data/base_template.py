"""The interface of prompt templates: how a row becomes tokens, the same in training and in generation."""

from abc import ABC, abstractmethod

from fedspeed.data.encode import Encoded
from fedspeed.data.rows import Row


class PromptTemplate(ABC):
    """A prompt template together with a tokenizer.

    Attributes:
        name: of the template, a value of data.template other than auto.
        stop_ids: tokens that end an answer.
    """

    name: str
    stop_ids: frozenset[int]

    @abstractmethod
    def prompt_text(self, row: Row) -> str:
        """Return the text before the answer of a row, for people."""

    @abstractmethod
    def prompt_ids(self, row: Row) -> list[int]:
        """Return the token ids of everything before the answer of a row, exactly as in training."""

    @abstractmethod
    def encode(self, row: Row) -> Encoded:
        """Return the examples of a row, truncated to data.max_tokens."""
