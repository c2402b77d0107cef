"""The text that a chat template makes of a conversation, and the token ids of that text.

Text and ids are those of `tokenizer.apply_chat_template`, except that the name of a special token inside a
message, such as `</s>`, becomes the ids of its characters: as a special token it would control the model.
"""

import copy
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import Any

from fedspeed.data.encode import text_ids
from fedspeed.data.rows import Message
from fedspeed.errors import DataError

DATE = date(2024, 7, 26)  # where a template writes today's date; Llama 3's own date where it knows no other
_DATE_CALL = re.compile(r"""strftime_now\s*\(\s*(["'])(.*?)\1\s*\)""")
# Private characters around the name of a special token in a message.
_BEGIN = "\ue0f0"
_END = "\ue0f1"


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation; `names` are the spans [start, end) of special tokens' names that stand in
    its messages, in order.
    """

    text: str
    names: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class ChatTokens:
    """Token ids, and the index of the text's character that each token begins and ends at."""

    ids: list[int]
    offsets: list[tuple[int, int]]

    def within(self, start: int, end: int) -> tuple[int, int]:
        """Return the tokens [first, last) that have a character of the text's span [start, end)."""
        first = bisect_right(self.offsets, start, key=lambda offset: offset[1])
        return first, max(first, bisect_left(self.offsets, end, key=lambda offset: offset[0]))


class ChatRendering:
    """A chat template with its tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        jinja: source of the template.
        origin: where the template is from, for messages.

    Attributes:
        jinja: source of the template. If it writes today's date, a fixed date is in its place, since training
            text must not depend on the day.
        is_dated: whether that is so.

    Raises:
        DataError: the tokenizer is not a fast one, or the template's date cannot be fixed.
    """

    def __init__(self, tokenizer: Any, jinja: str, origin: str):
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"data.template=chat needs a fast tokenizer (tokenizer.json), and this one is a "
                f"{type(tokenizer).__name__}; save it as tokenizer.json, or choose data.template=alpaca"
            )
        self._tokenizer = tokenizer
        self._origin = origin
        self.jinja = _DATE_CALL.sub(lambda call: repr(DATE.strftime(call[2])), jinja)
        self.is_dated = self.jinja != jinja
        if "strftime_now(" in self.jinja:
            raise DataError(
                f"{origin}: writes today's date in a form that is computed, so that training text would "
                "differ from day to day; give a template with a fixed date in data.chat_template"
            )
        added = self._tokenizer.added_tokens_decoder.items()
        special = {str(token) for _, token in added if token.special} | set(
            self._tokenizer.all_special_tokens
        )
        # DeepSeek's tokens for roles are not marked as special.
        of_template = {str(token) for _, token in added if str(token).strip() and str(token) in self.jinja}
        self._special = special - {""}
        self._control = self._special | of_template
        ids = self._tokenizer.convert_tokens_to_ids(sorted(self._control))
        self._control_ids = dict(zip(ids, sorted(self._control)))
        self._encoder = _plain_encoder(tokenizer, len(tokenizer))

    def render(self, messages: Sequence[Message], *, generation: bool = False) -> Rendered:
        """Return the text of a conversation.

        Args:
            generation: whether the beginning of an answer follows.

        Raises:
            DataError: the template refuses the conversation.
        """
        plain = self._text(messages, generation)
        marked = [Message(m.role, self._marked(m)) for m in messages]
        if marked == [Message(m.role, _unmarked(m.content)) for m in messages]:
            return Rendered(plain)
        text, names = _without_marks(self._text(marked, generation))
        if text != _unmarked(plain):
            found = sorted({name for m in messages for name in self._names(m.role).findall(m.content)})
            raise DataError(
                f"a message holds {', '.join(found)}, and {self._origin} decides by it what it writes, so "
                "that it cannot be made plain text; remove it from the message"
            )
        return Rendered(text, names)

    def tokens(self, rendered: Rendered) -> ChatTokens:
        """Return the ids of a text. Special tokens that the template writes are control tokens, and those of
        the messages are spelled out.
        """
        encoding = self._encoder.encode(rendered.text, add_special_tokens=False)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for token, (start, end) in zip(encoding.ids, encoding.offsets):
            is_name = token in self._control_ids and any(s < end and start < e for s, e in rendered.names)
            pieces = self._spelled(rendered.text[start:end]) if is_name else [token]
            ids += pieces
            if token in self._control_ids:  # without the space that it takes from the text around it
                start = rendered.text.index(self._control_ids[token], start)
                end = start + len(self._control_ids[token])
            offsets += [(start, end)] * len(pieces)
        return ChatTokens(ids, offsets)

    def first_control(self, text: str) -> tuple[int, int] | None:
        """Return the id of the first special token in a text of the template, and the index behind its name;
        None if there is none.
        """
        encoding = self._encoder.encode(text, add_special_tokens=False)
        for token, (start, _) in zip(encoding.ids, encoding.offsets):
            if name := self._control_ids.get(token):
                return token, text.index(name, start) + len(name)
        return None

    def _text(self, messages: Sequence[Message], generation: bool) -> str:
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._tokenizer.apply_chat_template(
                conversation, chat_template=self.jinja, tokenize=False, add_generation_prompt=generation
            )
        except Exception as error:  # a template may raise anything
            roles = " ".join(message.role for message in messages)
            raise DataError(
                f"{self._origin} refuses a conversation of {roles}: {_first_line(error)}; "
                f"{_remedy(messages)}, or give another template in data.chat_template"
            ) from error

    def _names(self, role: str) -> re.Pattern[str]:
        """Return the pattern of names that are text in a message of a role.

        An answer may hold tokens of the template that are not marked as special, such as `<think>`: the model
        writes them itself.
        """
        names = self._special if role == "assistant" else self._control
        return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")

    def _marked(self, message: Message) -> str:
        return self._names(message.role).sub(f"{_BEGIN}\\g<0>{_END}", _unmarked(message.content))

    def _spelled(self, text: str) -> list[int]:
        """Return the ids of a text that are no control tokens."""
        ids = text_ids(text, self._tokenizer)
        first = str(self._tokenizer.convert_ids_to_tokens(ids[0])) if ids else ""
        if first.startswith("\u2581") and not text.startswith((" ", "\u2581")):
            # A SentencePiece model begins every text with a space, which does not belong here.
            newline = text_ids("\n", self._tokenizer)
            ids = text_ids("\n" + text, self._tokenizer)[len(newline) :]
        return [piece for token in ids for piece in self._characters(token)]

    def _characters(self, token: int) -> list[int]:
        """Return the ids of a token, of a control token those of its characters."""
        if (name := self._control_ids.get(token)) is None or len(name) == 1:
            return [token]
        return [piece for character in name for piece in text_ids(character, self._tokenizer)]


@lru_cache(maxsize=2)  # a copy of a large vocabulary takes a second, and each client has a template
def _plain_encoder(tokenizer: Any, _size: int) -> Any:
    """Return a copy of a fast tokenizer's encoder whose offsets cover the whole text, spaces included.

    Args:
        _size: of its vocabulary; tokens may be added to it later.
    """
    from tokenizers import processors

    encoder = copy.deepcopy(tokenizer.backend_tokenizer)
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = False
    encoder.post_processor = processors.ByteLevel(trim_offsets=False)
    return encoder


def _unmarked(text: str) -> str:
    return text.replace(_BEGIN, "").replace(_END, "")


def _without_marks(text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Return a text without its marks, and the spans between them. A template may remove one mark of a pair
    together with the name.
    """
    pieces: list[str] = []
    names: list[tuple[int, int]] = []
    length = 0
    begin = None
    for piece in re.split(f"([{_BEGIN}{_END}])", text):
        if piece == _BEGIN:
            begin = length
        elif piece == _END:
            if begin is not None:
                names.append((begin, length))
            begin = None
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), tuple(names)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _remedy(messages: Sequence[Message]) -> str:
    roles = [message.role for message in messages]
    if roles[:1] == ["system"]:
        return "leave out data.system_prompt and system messages if the model knows none"
    if "tool" in roles or "system" in roles:
        return "remove messages of roles that it does not know"
    return "correct the order of the row's messages (user and assistant in turn, the user first)"
