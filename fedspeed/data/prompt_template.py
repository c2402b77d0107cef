"""The prompt template of a run, which follows from its data configuration and its tokenizer."""

from pathlib import Path
from typing import get_args

from fedspeed.data.base_template import PromptTemplate
from fedspeed.data.chat_template import ChatTemplate
from fedspeed.data.config import DataConfig, TemplateName
from fedspeed.data.encode import Encoded, Tokenizer
from fedspeed.data.rows import Row
from fedspeed.data.text_template import TextTemplate
from fedspeed.errors import DataError

__all__ = ["NAMES", "PromptTemplate", "template_for"]

NAMES: tuple[TemplateName, ...] = tuple(name for name in get_args(TemplateName) if name != "auto")


def template_for(config: DataConfig, tokenizer: Tokenizer) -> PromptTemplate:
    """Return the prompt template of a run.

    data.template=auto is plain for the built-in task, none for rows of prompt and completion, else chat where
    the tokenizer or data.chat_template has a chat template, and alpaca where there is none.

    Raises:
        DataError: the template cannot be used with this tokenizer or with data.system_prompt; names the
            remedy.
    """
    template = _named(_name(config, tokenizer), config, tokenizer)
    return _Automatic(template, config, tokenizer) if config.template == "auto" else template


class _Automatic(PromptTemplate):
    """A template that data.template=auto has chosen; rows of prompt and completion have none.

    Args:
        chosen: for all other rows. config, tokenizer: of the run.
    """

    def __init__(self, chosen: PromptTemplate, config: DataConfig, tokenizer: Tokenizer):
        self._chosen = chosen
        self._completions = TextTemplate("none", tokenizer, config)
        self.name = chosen.name
        self.stop_ids = chosen.stop_ids
        self.jinja = chosen.jinja
        self.notes = chosen.notes

    def prompt_text(self, row: Row) -> str:
        return self._of(row).prompt_text(row)

    def prompt_ids(self, row: Row) -> list[int]:
        return self._of(row).prompt_ids(row)

    def encode(self, row: Row) -> Encoded:
        return self._of(row).encode(row)

    def _of(self, row: Row) -> PromptTemplate:
        return self._completions if row.is_completion else self._chosen


def _named(name: TemplateName, config: DataConfig, tokenizer: Tokenizer) -> PromptTemplate:
    if name == "chat":
        return _chat_template(config, tokenizer)
    if config.system_prompt:
        raise DataError(
            f"data.system_prompt: template {name} has no form for a system message; leave it out, or choose "
            "data.template=chat, with data.chat_template if the tokenizer has no chat template"
        )
    return TextTemplate(name, tokenizer, config)


def _name(config: DataConfig, tokenizer: Tokenizer) -> TemplateName:
    if config.template != "auto":
        return config.template
    if config.task == "builtin":
        return "plain"
    return "chat" if config.chat_template or tokenizer.chat_template else "alpaca"


def _chat_template(config: DataConfig, tokenizer: Tokenizer) -> ChatTemplate:
    if config.chat_template:
        key = f"data.chat_template={config.chat_template}"
        return ChatTemplate(tokenizer, _read(key, config.chat_template), key, config)
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        if "default" not in templates:
            raise DataError(
                f"the tokenizer has several chat templates ({', '.join(sorted(templates))}) and none is "
                "called default; write the one to use into a file and name it in data.chat_template"
            )
        templates = templates["default"]
    if not templates:
        raise DataError(
            "data.template=chat: the tokenizer has no chat template; choose data.template=alpaca, or give a "
            "jinja file in data.chat_template"
        )
    return ChatTemplate(tokenizer, templates, "the tokenizer's chat template", config)


def _read(key: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise DataError(
            f"{key}: cannot be read ({reason}); name a file with a chat template in jinja"
        ) from error
