"""The prompt template of a run, which follows from its data configuration and its tokenizer."""

from typing import get_args

from fedspeed.data.base_template import PromptTemplate
from fedspeed.data.config import DataConfig, TemplateName
from fedspeed.data.encode import Tokenizer
from fedspeed.data.text_template import TextTemplate

__all__ = ["NAMES", "PromptTemplate", "template_for"]

NAMES: tuple[TemplateName, ...] = tuple(name for name in get_args(TemplateName) if name != "auto")


def template_for(config: DataConfig, tokenizer: Tokenizer) -> PromptTemplate:
    """Return the prompt template of a run. data.template=auto is plain for the built-in task, else alpaca."""
    name = config.template
    if name == "auto":
        name = "plain" if config.task == "builtin" else "alpaca"
    return TextTemplate(name, tokenizer, config.max_tokens)
