"""The format of a run's prompts, which follows from its tokenizer and its data configuration."""

from fedspeed.data.config import DataConfig
from fedspeed.data.encode import Tokenizer, leading_special_ids
from fedspeed.data.prompt_template import template_for
from fedspeed.data.prompting import PromptFormat
from fedspeed.data.rows import Row

MAX_NEW_TOKENS = 64  # of the example's answer
EXAMPLES = {  # invented, so that no row of a client is shown
    "builtin": Row("reverse", "dabe", "", ""),
    "gsm8k": Row("Tom has 3 apples and buys 2 more. How many apples does he have?", "", "", ""),
    "codealpaca": Row("Write a function that adds two numbers.", "Python", "", ""),
}
EXAMPLE = Row("Name three colours.", "", "", "")


def format_of(tokenizer: Tokenizer, config: DataConfig) -> PromptFormat:
    """Return the format of a run's prompts, with an invented example."""
    template = template_for(config, tokenizer)
    row = EXAMPLES.get(config.task, EXAMPLE)
    leading = leading_special_ids(tokenizer)
    remaining = config.max_tokens - len(template.prompt_ids(row))
    return PromptFormat(
        template.name,
        (tuple(leading), "".join(tokenizer.convert_ids_to_tokens(leading))),
        (tokenizer.eos_token_id, tokenizer.eos_token),
        pad_id=tokenizer.pad_token_id,
        example=(template.prompt_text(row), min(MAX_NEW_TOKENS, max(1, remaining))),
        chat_template=bool(tokenizer.chat_template),
    )
