"""The interface of prompt templates: how a row becomes tokens, the same in training and in generation."""

from abc import ABC, abstractmethod

from fedspeed.data.encode import Encoded
from fedspeed.data.rows import Row


class PromptTemplate(ABC):
    """A prompt template together with a tokenizer.

    Attributes:
        name: of the template, a value of data.template other than auto.
        stop_ids: tokens that end an answer.
        jinja: of a chat template its source, which is exported with the model; else empty.
        notes: what a user should know about the template, a sentence each.
    """

    name: str
    stop_ids: frozenset[int]
    jinja: str = ""
    notes: tuple[str, ...] = ()

    @abstractmethod
    def prompt_text(self, row: Row) -> str:
        """Return the text before the answer of a row, for people."""

    @abstractmethod
    def prompt_ids(self, row: Row) -> list[int]:
        """Return the token ids of everything before the answer of a row, exactly as in training."""

    @abstractmethod
    def encode(self, row: Row) -> Encoded:
        """Return the examples of a row within data.max_tokens, by the policy data.too_long.

        Raises:
            DataError: the template cannot express the row, or it is too long with data.too_long=error.
        """
