"""The model's own chat template as a prompt template: conversations with a loss on the assistant's turns."""

from collections.abc import Sequence

import numpy as np

from fedspeed.data.base_template import PromptTemplate
from fedspeed.data.chat_rendering import DATE, ChatRendering, Rendered
from fedspeed.data.config import DataConfig
from fedspeed.data.encode import Encoded, Example, Tokenizer, leading_special_ids
from fedspeed.data.rows import Message, Row
from fedspeed.data.templates import question
from fedspeed.data.text_template import encode_text
from fedspeed.data.too_long import shortened
from fedspeed.errors import DataError

_ANSWER = "\ue0f2"  # stands for an answer where the template's own text is looked at
_QUESTION = Message("user", "Hello")


class ChatTemplate(PromptTemplate):
    """A chat template of a tokenizer, or of the file data.chat_template.

    An answer is everything that the template writes behind its generation prompt, up to its end-of-turn
    token: what the model must generate. Where the template writes an answer otherwise in the middle of a
    conversation than at its end (reasoning models drop earlier reasoning), each answer is an example of its
    own, which ends with it.

    Args:
        tokenizer: of the run. jinja: source of the template. origin: where it is from, for messages.
        config: for data.system_prompt, data.max_tokens and data.too_long.

    Raises:
        DataError: the template cannot be trained with; says why.
    """

    def __init__(self, tokenizer: Tokenizer, jinja: str, origin: str, config: DataConfig):
        self.name = "chat"
        self._tokenizer = tokenizer
        self._config = config
        self._rendering = ChatRendering(tokenizer, jinja, origin)
        self.jinja = self._rendering.jinja
        prompt = self._rendering.render([_QUESTION]).text
        begun = self._rendering.render([_QUESTION], generation=True).text
        answered = self._rendering.render([_QUESTION, Message("assistant", _ANSWER)]).text
        if answered.count(_ANSWER) != 1:
            raise DataError(
                f"{origin}: does not write an answer once; correct it, or choose another template"
            )
        before, _, self._tail = answered.partition(_ANSWER)
        self._header = ""
        self._surplus = ""
        if begun == prompt and before.startswith(begun):
            # It knows no generation prompt; space before the answer belongs to its first word.
            self._header = before[len(begun) :].rstrip(" ")
        elif not before.startswith(begun):
            common = _common_length(before, begun)
            self._surplus = begun[common:]
            if not before[:common].startswith(prompt):
                raise DataError(
                    f"{origin}: its generation prompt and its answers begin differently; give a corrected "
                    "template in data.chat_template"
                )
        end = self._rendering.first_control(self._tail)
        if end is None:
            raise DataError(
                f"{origin}: writes no special token behind an answer, so that the model would not learn to "
                "stop; write {{ eos_token }} there in a template of your own (data.chat_template)"
            )
        self._end_length = end[1]
        self.stop_ids = frozenset([tokenizer.eos_token_id, end[0]])
        self.notes = tuple(self._remarks(origin))

    def prompt_text(self, row: Row) -> str:
        return "" if row.is_text else self._prompt(self._question(row)).text

    def prompt_ids(self, row: Row) -> list[int]:
        if row.is_text:
            return leading_special_ids(self._tokenizer)
        return self._rendering.tokens(self._prompt(self._question(row))).ids

    def encode(self, row: Row) -> Encoded:
        if row.is_text:
            return encode_text(row, self._tokenizer, self._config)
        messages = self._conversation(row)
        # A greeting at the beginning has no prompt.
        answers = [i for i, message in enumerate(messages) if message.role == "assistant" and message.trained]
        ends = [i + 1 for i in answers if i > 0]
        if not ends:
            raise DataError(
                "the conversation has no message of the assistant that is trained on; remove the row"
            )
        prompts = [self._prompt(messages[: end - 1]) for end in ends]
        answered = [self._answered(messages[:end], prompt) for end, prompt in zip(ends, prompts)]
        spans = [(len(prompt.text), self._answer_end(text)) for prompt, text in zip(prompts, answered)]
        whole = self._rendering.render(messages[: ends[-1]])
        begun = [text.text[:end] for text, (_, end) in zip(answered, spans)]
        if all(whole.text.startswith(text) for text in begun):
            examples = [self._example(whole, spans)]
        else:
            examples = [self._example(text, [span]) for text, span in zip(answered, spans)]
        return shortened(examples, self._config, self._tokenizer)

    def _answered(self, messages: Sequence[Message], prompt: Rendered) -> Rendered:
        """Return the text of a conversation that ends with an answer; it begins with the prompt's text.

        Mistral's template writes the system message before the last question only where no answer follows.
        There the answer is rendered behind another question, and added to the prompt.
        """
        whole = self._rendering.render(messages)
        if not whole.text.endswith(self._tail):
            raise DataError(
                "the chat template leaves out the last answer, or writes it in an unusual form; remove the "
                "row, or give another template in data.chat_template"
            )
        if whole.text.startswith(prompt.text):
            return whole
        answer = self._rendering.render([_QUESTION, messages[-1]])
        begun = len(self._prompt([_QUESTION]).text)
        if not whole.text.endswith(answer.text[begun:]):
            raise DataError(
                "the chat template writes an answer otherwise than it begins one; remove the row, or give "
                "another template in data.chat_template"
            )
        shift = len(prompt.text) - begun
        names = ((start + shift, end + shift) for start, end in answer.names)
        return Rendered(prompt.text + answer.text[begun:], (*prompt.names, *names))

    def _answer_end(self, answered: Rendered) -> int:
        return len(answered.text) - len(self._tail) + self._end_length

    def _example(self, rendered: Rendered, spans: Sequence[tuple[int, int]]) -> Example:
        """Return an example with a loss on the tokens of some spans of characters."""
        tokens = self._rendering.tokens(rendered)
        answers = [tokens.within(*span) for span in spans]
        starts = [*(start for start, _ in answers[1:]), len(tokens.ids)]
        gaps = [(end, start) for (_, end), start in zip(answers, starts) if end < start]
        return Example(np.asarray(tokens.ids, dtype=np.int32), answers[0][0], later_prompts=tuple(gaps))

    def _prompt(self, messages: Sequence[Message]) -> Rendered:
        """Return the text before the next answer of a conversation."""
        rendered = self._rendering.render(messages, generation=True)
        return Rendered(rendered.text.removesuffix(self._surplus) + self._header, rendered.names)

    def _question(self, row: Row) -> list[Message]:
        messages = self._conversation(row)
        return messages[:-1] if messages[-1].role == "assistant" else messages

    def _conversation(self, row: Row) -> list[Message]:
        """Return the messages of a row with the system prompt, up to the last one of the assistant."""
        messages = list(row.messages)
        if not messages:
            messages = [Message("user", question(row, "\n\n")), Message("assistant", row.output)]
        if self._config.system_prompt and messages[0].role != "system":
            messages.insert(0, Message("system", self._config.system_prompt))
        return messages

    def _remarks(self, origin: str) -> list[str]:
        remarks = []
        if self._rendering.is_dated:
            remarks.append(
                f"{origin} writes today's date; in training, in answers and in the exported template it is "
                f"{DATE:%d %B %Y}"
            )
        if self._surplus:
            remarks.append(
                f"{origin} ends a prompt with {self._surplus!r}, which it does not write before the answer "
                "of a row: training and `fedspeed chat` leave it out"
            )
        return remarks


def _common_length(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
