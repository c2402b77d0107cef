"""Values that ranks read from the job's key-value store.

Any program that reaches the store's port can write into it, so no value is trusted to be well-formed.
"""

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from fedspeed.errors import LostPeerError

T = TypeVar("T")

_MALFORMED = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
_SHOWN = 80  # characters of a malformed value in a message


class ReadableStore(Protocol):
    """A store whose existing keys can be read."""

    def get(self, *keys: str) -> list[str]:
        """Return the values of keys that exist."""
        ...


def read_values(store: ReadableStore, keys: Iterable[str], parse: Callable[[str], T]) -> list[T]:
    """Return the parsed values of keys that exist.

    Args:
        parse: of one value; where it is malformed, raises one of the exceptions by which json, conversions
            and lookups fail.

    Raises:
        LostPeerError: a value is malformed, or the store does not answer.
    """
    keys = list(keys)
    return parse_values(keys, store.get(*keys), parse)


def parse_values(keys: Iterable[str], texts: Iterable[str], parse: Callable[[str], T]) -> list[T]:
    """Return parsed values that have been read already, in the order of their keys; see `read_values`.

    Raises:
        LostPeerError: a value is malformed.
    """
    parsed = []
    for key, text in zip(keys, texts, strict=True):
        try:
            parsed.append(parse(text))
        except _MALFORMED:
            raise LostPeerError(
                f"the value of `{key}` in the store of the job's ranks is malformed ({text[:_SHOWN]!r}): "
                "another program has written it; start again, and keep other programs and users from the "
                "network of the job's hosts"
            ) from None
    return parsed
