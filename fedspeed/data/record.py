"""Access to the fields of a record as typed values. Every fault is a `DataError` that names the record, the
field, its value and the remedy. Pure.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedspeed.errors import DataError


@dataclass(frozen=True)
class Record:
    """A record of a data file, or an object inside one.

    Attributes:
        values: its fields by name. A field with the value None counts as absent.
        where: names the record in messages, such as "file:line".
    """

    values: Mapping[str, Any]
    where: str

    def has(self, name: str) -> bool:
        """Return whether the record has a value in a field; without a name, it has none."""
        return bool(name) and self.values.get(name) is not None

    def text(self, name: str, meaning: str = "", remedy: str = "correct the record or remove it") -> str:
        """Return a text field.

        Args:
            meaning: what the field is for. remedy: for a record without the field.

        Raises:
            DataError: the field is missing, or is not text that can be encoded as UTF-8.
        """
        if name not in self.values:
            use = f" for the {meaning}" if meaning else ""
            raise DataError(f"{self.where}: no field {name!r}{use} (the record has: {self.names}); {remedy}")
        value = self.values[name]
        if not isinstance(value, str):
            raise DataError(
                f"{self.where}: field {name!r} must be text, this is {shown(value)}; correct the record or "
                "remove it"
            )
        return self._encodable(value, name)

    def optional_text(self, name: str) -> str:
        """Return a text field, empty where the record has no such field.

        Raises:
            DataError: the field is something else than text.
        """
        return self.text(name) if self.has(name) else ""

    def category(self, name: str) -> str:
        """Return the text of a category, which may be a number; empty where the record has none.

        Raises:
            DataError: the field is a list or an object, or is not text that can be encoded as UTF-8.
        """
        value = self.values[name] if self.has(name) else None
        if isinstance(value, (list, dict)):
            raise DataError(
                f"{self.where}: field {name!r} must be a plain category, this is {shown(value)}; "
                "name another field in data.category_field"
            )
        text = "" if value is None else str(value)
        return self._encodable(text, name) if text.strip() else ""

    def objects(self, name: str, remedy: str) -> list["Record"]:
        """Return the objects of a list.

        Raises:
            DataError: the field is no list, or holds something else than objects.
        """
        items = self.values.get(name)
        if not isinstance(items, list):
            raise DataError(f"{self.where}: field {name!r} must be a list, this is {shown(items)}; {remedy}")
        found = []
        for number, item in enumerate(items):
            where = f"{self.where}, {name}[{number}]"
            if not isinstance(item, dict):
                raise DataError(f"{where}: must be an object, this is {shown(item)}; {remedy}")
            found.append(Record(item, where))
        return found

    @property
    def names(self) -> str:
        """Return the names of the record's fields, for messages."""
        return ", ".join(map(str, self.values)) or "nothing"

    def _encodable(self, value: str, name: str) -> str:
        try:
            value.encode()
        except UnicodeEncodeError as error:  # an escaped surrogate, which JSON allows, tokenizers do not
            raise DataError(
                f"{self.where}: field {name!r} holds {ascii(value[error.start])} at character {error.start}, "
                "half of a character; correct the record or remove it"
            ) from None
        return value


def shown(value: object) -> str:
    """Return the type and the beginning of a value, for messages."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def first_object(value: object) -> Mapping[str, Any] | None:
    """Return the object that a list begins with; None where the value is something else."""
    return value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else None
