"""How to prompt a trained model: with exactly the format that it was trained with. The report, the model card
and `fedspeed chat` use it.
"""

from dataclasses import dataclass

from fedspeed.data.rows import Row
from fedspeed.data.templates import prompt


@dataclass(frozen=True)
class ChatFormat:
    """The chat template that a model was trained with.

    Attributes:
        jinja: its source, which is exported with the tokenizer.
        system_prompt: of the conversations that had no system message; empty: none.
        messages: (role, content) of the example that apply_chat_template makes a prompt of; empty where the
            prompt of the training differs from that.
        notes: what a user should know about the template, a sentence each.
    """

    jinja: str
    system_prompt: str
    messages: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PromptFormat:
    """The format of prompts and answers that a model was trained with.

    Attributes:
        template: a value of data.template other than auto.
        leading: ids and text of the tokens before every prompt; empty if there are none.
        end: ids and text of the tokens that end an answer.
        pad_id: id of the padding token.
        example: a prompt as text, and the number of tokens that its answer may have.
        chat_template: whether the base's tokenizer has a chat template.
        chat: of the template `chat`; else None, and nothing was trained with a chat template.
    """

    template: str
    leading: tuple[tuple[int, ...], str]
    end: tuple[tuple[int, ...], str]
    pad_id: int
    example: tuple[str, int]
    chat_template: bool = False
    chat: ChatFormat | None = None

    def to_markdown(self) -> str:
        """Return a description of the format in Markdown."""
        if self.chat:
            return self._chat_markdown(self.chat)
        leading = f"the token `{self.leading[1]}`, then " if self.leading[0] else ""
        blocks = []
        for title, input_text in (("with an input", "{input}"), ("without one", "")):
            text = prompt(Row("{instruction}", input_text, "", ""), self.template)
            blocks.append(f"An instruction {title}:\n\n{fenced(text)}")
        ends_with_space = prompt(Row("a", "", "", ""), self.template).endswith(" ")
        space = ", with the one space at its end" if ends_with_space else ""
        facts = (
            f"Every row was {leading}the prompt (template `{self.template}`){space}, the answer, and the "
            f"token `{self.end[1]}` at its end. "
            "The answer follows the prompt without anything between. Names of special tokens inside a text "
            "were read as text."
        )
        if self.template == "none":
            facts += " Rows that were plain text had no prompt."
        if self.chat_template:
            facts += " The base has a chat template; it is not exported, because nothing was trained with it."
        return "\n\n".join([facts, *blocks])

    def _chat_markdown(self, chat: ChatFormat) -> str:
        """Return the description of a chat template."""
        facts = (
            "Every row was a conversation in the chat template that is exported with the tokenizer "
            "(`tokenizer.apply_chat_template`). The model was trained on each answer with the token that "
            f"ends it; tokens that end an answer: `{self.end[1]}`. "
            "The input of a row, if it had one, followed its instruction after a blank line, in the same "
            "message. "
            "Names of special tokens inside a message were read as text."
        )
        blocks = [facts, *(f"{note[:1].upper()}{note[1:]}." for note in chat.notes)]
        if chat.system_prompt:
            blocks.append(f"The system message where a row had none:\n\n{fenced(chat.system_prompt)}")
        blocks.append(f"A prompt as the model saw it:\n\n{fenced(self.example[0])}")
        return "\n\n".join(blocks)


def fenced(text: str, language: str = "text") -> str:
    """Return a Markdown code block with a text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def snippet(kind: str, folder: str, base: str, dtype: str, format: PromptFormat | None) -> str:
    """Return Python code that loads an export and generates an answer with it.

    Args:
        kind: `adapter` or `model`.
        folder: of the export, relative to where the code is run.
        base: folder or hub name of the base; used for an adapter only.
        dtype: its name in torch.
        format: of the prompts; None: the code only loads the export.
    """
    lines = ["import torch"]
    names = "AutoModelForCausalLM" + (", AutoTokenizer" if format else "")
    if kind == "model":
        lines += [
            f"from transformers import {names}",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.{dtype})",
        ]
    else:
        # Without this option PEFT computes the adapter in fp32.
        as_trained = "" if dtype == "float32" else ", autocast_adapter_dtype=False"
        lines += [
            "from peft import PeftModel",
            f"from transformers import {names}",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({base!r}, dtype=torch.{dtype})",
            f"model = PeftModel.from_pretrained(base, {folder!r}{as_trained})",
        ]
    if format:
        ends = format.end[0][0] if len(format.end[0]) == 1 else list(format.end[0])
        lines += [
            f"tokenizer = AutoTokenizer.from_pretrained({folder!r})",
            "",
            *_tokens_code(format),
            "ids = torch.tensor([tokens])",
            "output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), "
            f"max_new_tokens={format.example[1]}, do_sample=False,",
            f"                        eos_token_id={ends}, pad_token_id={format.pad_id})",
            "print(tokenizer.decode(output[0, len(tokens):], skip_special_tokens=True))",
        ]
    return "\n".join(lines)


def _tokens_code(format: PromptFormat) -> list[str]:
    """Return the lines that make the tokens of the example's prompt."""
    if format.chat and format.chat.messages:
        messages = [{"role": role, "content": content} for role, content in format.chat.messages]
        return [
            f"messages = {messages!r}",
            "tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)",
        ]
    prompt = f"prompt = {format.example[0]!r}"
    if format.chat:
        return [prompt, "tokens = tokenizer(prompt, add_special_tokens=False).input_ids"]
    leading = f"{list(format.leading[0])} + " if format.leading[0] else ""
    return [
        prompt,
        f"tokens = {leading}tokenizer(prompt, add_special_tokens=False, split_special_tokens=True).input_ids",
    ]
