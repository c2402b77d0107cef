"""The form of names on the Hugging Face hub."""

import re

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_name(text: str) -> bool:
    """Return whether a text that is no existing path may name a model or data set on the hub."""
    return bool(_HUB_NAME.fullmatch(text)) and not text.startswith((".", "runs/"))
