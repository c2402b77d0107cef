"""Conversations as people store them, made into messages. Pure.

OpenAI's form is a list of {"role", "content"}, ShareGPT's a list of {"from", "value"}. What a chat template
cannot be given, such as images and calls of tools, is refused: left out, it would change what is trained on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedspeed.data.record import Record, shown
from fedspeed.data.rows import Message, Row
from fedspeed.errors import DataError

REMOVE = "rewrite the conversation without it, or remove the record"


@dataclass(frozen=True)
class Style:
    """How one kind of conversation is written.

    Attributes:
        role, content: names of the fields of a message.
        roles: the roles that are written -> those of `Message`.
        example: a message, for error texts.
    """

    role: str
    content: str
    roles: Mapping[str, str]
    example: str


OPENAI = Style(
    role="role",
    content="content",
    roles={
        "system": "system",
        "developer": "system",
        "user": "user",
        "assistant": "assistant",
        "tool": "tool",
    },
    example='{"role": "user", "content": "..."}',
)
SHAREGPT = Style(
    role="from",
    content="value",
    roles={
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        "tool": "tool",
        "observation": "tool",
    },
    example='{"from": "human", "value": "..."}',
)
_CALLS = ("tool_calls", "function_call", "audio")  # of an OpenAI message
_TOOLS = ("tools", "functions")  # of a record


def messages_of(record: Record, name: str, style: Style, trained: bool = True) -> list[Message]:
    """Return the messages in a field of a record.

    Args:
        trained: whether assistant messages carry loss; one with "weight": 0 never does.

    Raises:
        DataError: a message is malformed, or has something else than text.
    """
    for tools in _TOOLS:
        if record.values.get(tools):
            raise DataError(
                f"{record.where}: field {tools!r} describes tools to the model, which no row can hold; "
                f"{REMOVE}"
            )
    items = record.objects(name, f"a conversation is a list of messages such as {style.example}")
    if not items:
        raise DataError(f"{record.where}: field {name!r} has no messages; fill it in or remove the record")
    return [_message(item, style, trained) for item in items]


def conversation_row(messages: Sequence[Message], category: str, where: str) -> Row:
    """Return the row of a conversation, without the messages that follow the last trained one.

    Raises:
        DataError: no assistant message is trained, or no message has any text.
    """
    last = max(
        (i for i, message in enumerate(messages) if message.role == "assistant" and message.trained),
        default=None,
    )
    if last is None:
        raise DataError(
            f"{where}: the conversation has no assistant message to train on (its roles are "
            f"{', '.join(message.role for message in messages)}); add one, or remove the record"
        )
    kept = tuple(messages[: last + 1])
    if not any(message.content.strip() for message in kept):
        raise DataError(f"{where}: the conversation is empty, no message has any text; remove the record")
    answer = kept[-1].content
    if [message.role for message in kept] == ["user", "assistant"] and kept[0].content:
        return Row(kept[0].content, "", answer, category)
    return Row("", "", answer, category, messages=kept)


def _message(item: Record, style: Style, trained: bool) -> Message:
    written = item.text(style.role, remedy=f"a message is written as {style.example}")
    role = style.roles.get(written)
    if role is None:
        raise DataError(
            f"{item.where}: {style.role!r} is {shown(written)}, which is no role of a message here; use "
            f"one of {', '.join(style.roles)}, or {REMOVE}"
        )
    for call in _CALLS:
        if item.values.get(call):
            raise DataError(f"{item.where}: field {call!r} cannot be trained on, only text can; {REMOVE}")
    if role == "assistant":
        trained = trained and _weight(item)
    return Message(role, _content(item, style), trained if role == "assistant" else True)


def _content(item: Record, style: Style) -> str:
    """Return the text of a message: a text, or OpenAI's list of parts, joined without anything between."""
    if not isinstance(item.values.get(style.content), list):
        return item.text(style.content, remedy=f"a message is written as {style.example}")
    texts = []
    for part in item.objects(style.content, 'parts are written as {"type": "text", "text": "..."}'):
        if part.text("type") != "text":
            raise DataError(
                f"{part.where}: a part of type {shown(part.values['type'])} cannot be trained on, only text "
                f"can; {REMOVE}"
            )
        texts.append(part.text("text"))
    return "".join(texts)


def _weight(item: Record) -> bool:
    """Return whether the `weight` of an assistant message lets it carry loss; without one it does."""
    weight = item.values.get("weight")
    if weight is None:
        return True
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(
            f"{item.where}: field 'weight' is {shown(weight)}, but must be 0 (no loss) or 1; correct it"
        )
    return bool(weight)
