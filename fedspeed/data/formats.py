"""The formats of records, and how each becomes a row. Pure.

A new format is a class here and an entry in `FORMATS`, and its name in `data.config.FormatName`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from fedspeed.data.conversations import OPENAI, SHAREGPT, Style, conversation_row, messages_of
from fedspeed.data.record import Record, first_object, shown
from fedspeed.data.rows import Message, Row
from fedspeed.errors import DataError


@dataclass(frozen=True)
class Fields:
    """The names of a record's fields that become the fields of a row; empty where the source has no such
    field. Formats other than `instruction` use the category only.
    """

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    category: str = "category"


class Format(ABC):
    """One format of records."""

    @abstractmethod
    def recognises(self, record: Record, fields: Fields) -> bool:
        """Return whether a record has the fields of this format. Their values are checked by `row`."""

    @abstractmethod
    def row(self, record: Record, fields: Fields) -> Row:
        """Return the row of a record.

        Raises:
            DataError: a field is missing or of the wrong type, or the row has no text at all.
        """


class _Instruction(Format):
    """Fields with an instruction, an answer, and optionally an input, whose names can be configured."""

    def recognises(self, record: Record, fields: Fields) -> bool:
        return record.has(fields.instruction) and record.has(fields.output)

    def row(self, record: Record, fields: Fields) -> Row:
        row = Row(
            instruction=_named(record, fields.instruction, "instruction"),
            input=record.optional_text(fields.input),
            output=_named(record, fields.output, "output"),
            category=record.category(fields.category),
        )
        if not (row.instruction + row.input + row.output).strip():
            raise DataError(
                f"{record.where}: the row is empty, without any text in instruction, input and output; fill "
                "it in or remove it"
            )
        return row


class _Conversation(Format):
    """A conversation in the field `messages` or `conversations`."""

    def __init__(self, style: Style):
        self._style = style

    def recognises(self, record: Record, fields: Fields) -> bool:
        name = _conversation_field(record)
        first = first_object(record.values.get(name))
        return first is not None and self._style.role in first

    def row(self, record: Record, fields: Fields) -> Row:
        messages = messages_of(record, _conversation_field(record), self._style)
        if self._style is SHAREGPT and record.has("system") and record.text("system").strip():
            if messages[0].role == "system":
                raise DataError(
                    f"{record.where}: the record has a system prompt in field 'system' and another one "
                    "in its conversation; remove one of them"
                )
            messages = [Message("system", record.text("system")), *messages]
        return conversation_row(messages, record.category(fields.category), record.where)


class _PromptCompletion(Format):
    """A prompt and its completion: two texts, or two lists of messages."""

    def recognises(self, record: Record, fields: Fields) -> bool:
        return record.has("prompt") and record.has("completion")

    def row(self, record: Record, fields: Fields) -> Row:
        category = record.category(fields.category)
        lists = [isinstance(record.values.get(name), list) for name in ("prompt", "completion")]
        if all(lists):
            messages = [
                *messages_of(record, "prompt", OPENAI, trained=False),
                *messages_of(record, "completion", OPENAI),
            ]
            return conversation_row(messages, category, record.where)
        if any(lists):
            raise DataError(
                f"{record.where}: of 'prompt' and 'completion' one is a list and one is not (prompt: "
                f"{shown(record.values.get('prompt'))}); make both a text, or both a list of messages"
            )
        row = Row(record.text("prompt"), "", record.text("completion"), category, is_completion=True)
        if not (row.instruction + row.output).strip():
            raise DataError(f"{record.where}: prompt and completion are blank; fill them in or remove them")
        return row


class _Text(Format):
    """A text that is trained on as a whole."""

    def recognises(self, record: Record, fields: Fields) -> bool:
        return record.has("text")

    def row(self, record: Record, fields: Fields) -> Row:
        text = record.text("text")
        if not text.strip():
            raise DataError(f"{record.where}: field 'text' is blank; fill it in or remove the record")
        return Row("", "", text, record.category(fields.category), is_text=True)


FORMATS: dict[str, Format] = {
    "instruction": _Instruction(),
    "messages": _Conversation(OPENAI),
    "sharegpt": _Conversation(SHAREGPT),
    "prompt_completion": _PromptCompletion(),
    "text": _Text(),
}


def format_name(first: Record, fields: Fields) -> str:
    """Return the name of the format of a file by the fields of its first record.

    Fields whose names were configured decide for `instruction`. A text next to the fields of another format
    is taken for a copy of them. Where nothing fits, the answer is `instruction`, whose error says so.

    Raises:
        DataError: the record has the fields of several formats.
    """
    names = [name for name, form in FORMATS.items() if form.recognises(first, fields)]
    default = Fields()
    is_configured = (fields.instruction, fields.output) != (default.instruction, default.output)
    if "instruction" in names and is_configured:
        return "instruction"
    if len(names) > 1:
        names = [name for name in names if name != "text"]
    if len(names) > 1:
        raise DataError(
            f"{first.where}: the record has the fields of several formats ({', '.join(names)}); choose one "
            "of them in data.format"
        )
    return names[0] if names else "instruction"


def to_record(value: object, where: str) -> Record:
    """Return a record of a file.

    Args:
        where: names the record in messages.

    Raises:
        DataError: the value is no object.
    """
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: a record must be a JSON object with the fields of a row, this is {shown(value)}; "
            "correct the record or remove it"
        )
    return Record(value, where)


def _named(record: Record, name: str, part: str) -> str:
    remedy = (
        f"name the right one with task=file and data.{part}_field, or choose the file that belongs to the "
        "task; docs/data.md shows the formats that are recognised"
    )
    return record.text(name, part, remedy)


def _conversation_field(record: Record) -> str:
    return "messages" if record.has("messages") or not record.has("conversations") else "conversations"
