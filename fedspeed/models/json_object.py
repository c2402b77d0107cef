"""Reading of a JSON file that must hold an object, such as the configuration of a model or an adapter."""

from pathlib import Path

from fedspeed.errors import ModelError
from fedspeed.files import json_value


def read_object(path: Path, what: str) -> dict:
    """Return the JSON object in a file.

    Args:
        what: the file should hold, with its article, for messages.

    Raises:
        ModelError: there is no such file, or it holds something else.
    """
    try:
        content = json_value(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; {path.parent} is not a folder with {what}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as {what} ({error}); copy the folder again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: not {what} but {type(content).__name__}; copy the folder again")
    return content
