"""Import of a class that a registry names by its module."""

from importlib import import_module


def class_in(path: str, kind: type) -> type:
    """Import the module `path`, and return the one subclass of `kind` that it defines."""
    module = import_module(path)
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, kind) and value.__module__ == module.__name__
    ]
    assert len(classes) == 1, f"{path} must define one subclass of {kind.__name__}, but has {len(classes)}"
    return classes[0]
