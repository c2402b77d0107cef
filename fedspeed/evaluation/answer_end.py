"""Where a generated answer ends, besides the model's own end token."""

from collections.abc import Callable, Sequence

from fedspeed.data.encode import Tokenizer
from fedspeed.data.eval_task import GenerationSettings


def ended(text: str, settings: GenerationSettings) -> str:
    """Return an answer up to where the settings end it."""
    text = before_stop_text(text, settings.stop_texts)
    return text[: closing_brace(text)] if settings.ends_with_brace else text


def before_stop_text(text: str, stop_texts: Sequence[str]) -> str:
    """Return a text up to the first of the stop texts that it contains."""
    return text[: min((text.find(stop) for stop in stop_texts if stop in text), default=len(text))]


def closing_brace(text: str) -> int | None:
    """Return the index behind the brace that closes the block in which a text begins; None if none does."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth < 0:
            return index + 1
    return None


def end_check(tokenizer: Tokenizer, settings: GenerationSettings) -> Callable[[Sequence[int]], bool] | None:
    """Return a function of an answer's tokens that tells whether the settings end it there; None if only the
    model does.
    """
    if not settings.stop_texts and not settings.ends_with_brace:
        return None
    # Only as many tokens are decoded as can hold a stop text: a token is at least one byte long.
    tail = max((len(text.encode()) for text in settings.stop_texts), default=0) + 8

    def is_done(tokens: Sequence[int]) -> bool:
        text = tokenizer.decode(list(tokens[-tail:]), skip_special_tokens=True)
        if any(stop in text for stop in settings.stop_texts):
            return True
        if not settings.ends_with_brace or "}" not in text:
            return False
        return closing_brace(tokenizer.decode(list(tokens), skip_special_tokens=True)) is not None

    return is_done
