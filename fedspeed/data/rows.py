"""Rows of text: what training and evaluation see of the data."""

from dataclasses import astuple, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: system, user, assistant or tool.
        trained: whether an assistant message carries loss; without meaning for other roles.
    """

    role: str
    content: str
    trained: bool = True


@dataclass(frozen=True)
class Row:
    """One row of text. `input` and `category` are empty where the source has none.

    Attributes:
        messages: a conversation of several turns, which ends with a trained assistant message. If there is
            one, instruction and input are empty and `output` is that last message. A conversation of one
            question and one answer has no messages: it is an instruction and an output.
        is_text: whether `output` is a whole text without prompt, which no template is applied to.
        is_completion: whether `instruction` is the text before `output` as it stands, which
            data.template=auto applies no template to.
        where: file and line of the row, for messages; empty where it is from no file.
    """

    instruction: str
    input: str
    output: str
    category: str
    messages: tuple[Message, ...] = ()
    is_text: bool = False
    is_completion: bool = False
    where: str = field(default="", compare=False, repr=False)


def digested_fields(row: Row) -> list[Any]:
    """Return what digests of rows cover of one row. Rows of a prompt and an answer have the same
    digest as in earlier versions.
    """
    fields: list[Any] = [row.instruction, row.input, row.output]
    if row.messages:
        fields.append([astuple(message) for message in row.messages])
    if row.is_text or row.is_completion:
        fields.append("text" if row.is_text else "completion")
    return fields
