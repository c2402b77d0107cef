"""Where a generated answer ends, besides the model's own end token."""

from collections.abc import Callable, Sequence

from fedspeed.data.encode import Tokenizer
from fedspeed.data.eval_task import GenerationSettings

EndCheck = Callable[[Sequence[int]], bool]
_BYTES_OF_A_LETTER = 4  # at most


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


def end_check(tokenizer: Tokenizer, settings: GenerationSettings) -> EndCheck | None:
    """Return a function of an answer's tokens that tells whether the settings end it there; None if only the
    model does.
    """
    has_stop = has_stop_text(tokenizer, settings.stop_texts)
    if not settings.ends_with_brace:
        return has_stop

    def is_done(tokens: Sequence[int]) -> bool:
        if has_stop is not None and has_stop(tokens):
            return True
        if "}" not in tokenizer.decode(list(tokens[-_BYTES_OF_A_LETTER:]), skip_special_tokens=True):
            return False
        return closing_brace(tokenizer.decode(list(tokens), skip_special_tokens=True)) is not None

    return is_done


def has_stop_text(tokenizer: Tokenizer, stop_texts: Sequence[str]) -> EndCheck | None:
    """Return a function of an answer's tokens that tells whether their end contains a stop text; None if
    there are none.

    Only as many tokens are decoded as can hold a stop text: a token is at least one byte long.
    """
    if not stop_texts:
        return None
    tail = max(len(text.encode()) for text in stop_texts) + 2 * _BYTES_OF_A_LETTER

    def is_done(tokens: Sequence[int]) -> bool:
        text = tokenizer.decode(list(tokens[-tail:]), skip_special_tokens=True)
        return any(stop in text for stop in stop_texts)

    return is_done
