"""A JSON file that must hold an object, for whoever reads a model's or an adapter's configuration without its
library.
"""

from pathlib import Path

from fedspeed.errors import ModelError
from fedspeed.files import json_value


def read_object(path: Path, what: str) -> dict:
    """The JSON object in a file; `what` it should be, with its article."""
    try:
        content = json_value(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; {path.parent} is not a folder with {what}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as {what} ({error}); copy the folder again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: not {what} but {type(content).__name__}; copy the folder again")
    return content
