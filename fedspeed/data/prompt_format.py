"""The format of a run's prompts, which follows from its tokenizer, its data configuration and its rows."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from fedspeed.data.config import DataConfig
from fedspeed.data.encode import leading_special_ids
from fedspeed.data.prompt_template import PromptTemplate, template_for
from fedspeed.data.prompting import ChatFormat, PromptFormat
from fedspeed.data.rows import Row
from fedspeed.data.templates import question

MAX_NEW_TOKENS = 64  # of the example's answer
EXAMPLES = {  # invented, so that no row of a client is shown
    "builtin": Row("reverse", "dabe", "", ""),
    "gsm8k": Row("Tom has 3 apples and buys 2 more. How many apples does he have?", "", "", ""),
    "codealpaca": Row("Write a function that adds two numbers.", "Python", "", ""),
}
EXAMPLE = Row("Name three colours.", "", "", "")


def with_template(config: DataConfig, rows: Iterable[Row]) -> DataConfig:
    """Return the configuration with data.template=none in place of auto if all rows are prompts with their
    completions, or texts: a template is applied to none of them.
    """
    if config.template != "auto" or config.task == "builtin":
        return config
    bare = [row.is_completion or row.is_text for row in rows]
    return replace(config, template="none") if bare and all(bare) else config


def format_of(tokenizer: Any, config: DataConfig) -> PromptFormat:
    """Return the format of a run's prompts, with an invented example.

    Args:
        tokenizer: of transformers.
    """
    template = template_for(config, tokenizer)
    row = EXAMPLES.get(config.task, EXAMPLE)
    leading = leading_special_ids(tokenizer)
    remaining = config.max_tokens - len(template.prompt_ids(row))
    ends = sorted(template.stop_ids)
    chat = None
    if template.name == "chat":
        chat = ChatFormat(
            template.jinja,
            config.system_prompt,
            _messages(template, tokenizer, row, config.system_prompt),
            notes=template.notes,
        )
    return PromptFormat(
        template.name,
        (tuple(leading), "".join(tokenizer.convert_ids_to_tokens(leading))),
        (tuple(ends), ", ".join(tokenizer.convert_ids_to_tokens(ends))),
        pad_id=tokenizer.pad_token_id,
        example=(template.prompt_text(row), min(MAX_NEW_TOKENS, max(1, remaining))),
        chat_template=bool(tokenizer.chat_template),
        chat=chat,
    )


def _messages(
    template: PromptTemplate, tokenizer: Any, row: Row, system_prompt: str
) -> tuple[tuple[str, str], ...]:
    """Return (role, content) of the messages that apply_chat_template makes the row's prompt of; none where
    it makes another one.
    """
    system = (("system", system_prompt),) if system_prompt else ()
    messages = (*system, ("user", question(row, "\n\n")))
    ids = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        chat_template=template.jinja,
        add_generation_prompt=True,
        return_dict=False,
    )
    return messages if ids == template.prompt_ids(row) else ()
