"""A conflict between values of a configuration."""

from dataclasses import dataclass

from fedspeed.config.run import RunConfig


@dataclass(frozen=True)
class Conflict:
    """Values that contradict each other.

    Attributes:
        keys: their dotted keys.
        text: why they contradict each other, and the remedy.
    """

    keys: tuple[str, ...]
    text: str


def chosen_method(config: RunConfig) -> str:
    """Return the chosen method as messages show it: its key and its name."""
    return f"federation.method.name={config.federation.method.name}"
