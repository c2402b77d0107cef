"""Classes that stand in a registry by the path of their module, which defines one of a kind."""

from importlib import import_module
from typing import TypeVar

T = TypeVar("T")


def class_in(path: str, kind: type[T]) -> type[T]:
    """Import a module, and return the one subclass of `kind` that it defines."""
    module = import_module(path)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, kind) and value.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{path} must define one subclass of {kind.__name__}, but has {len(found)}"
    return found[0]
