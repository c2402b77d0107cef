"""What a name on the Hugging Face hub looks like."""

import re

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_name(text: str) -> bool:
    """Whether a text that names no file here may be the name of a model or data set on the hub."""
    return bool(_HUB_NAME.fullmatch(text)) and not text.startswith((".", "runs/"))
