"""Text that other people wrote, made safe to print: names and addresses in cards, settings and errors of
peers, messages of libraries that quote them. A terminal obeys control characters, and a reader is misled by
characters that reverse the direction of a line.
"""

import unicodedata

MAX_QUOTED = 200  # characters of a foreign text in a message
MAX_NAME = 64  # characters of a name: as many as a certificate's common name may have
MAX_ADDRESS = 255


def visible(text: str) -> str:
    r"""Return a text in which every character that a terminal does not show is replaced by its escape
    sequence in Python (`\x1b`): control and formatting characters, bidirectional overrides, lone surrogates,
    characters that are not assigned. Line feeds, tabs and spaces of all kinds stay.
    """
    if text.isprintable():
        return text
    return "".join(character if _is_shown(character) else _escaped(character) for character in text)


def quoted(text: object, limit: int = MAX_QUOTED) -> str:
    """Return the first `limit` characters of a foreign text as one visible line, with an ellipsis if there
    are more.
    """
    line = str(text)
    cut = line[:limit] + "..." * (len(line) > limit)
    return "".join(character if character.isprintable() else _escaped(character) for character in cut)


def check_name(name: str) -> None:
    """Check a member's name. It becomes the name of two files, and stands in messages.

    Raises:
        ValueError: it is empty, too long, begins with a dot, begins or ends with a space, or holds a path
            separator or a character that is not printable.
    """
    is_plain = name.isprintable() and not {"/", "\\"} & set(name) and name == name.strip()
    if not is_plain or not 0 < len(name) <= MAX_NAME or name.startswith("."):
        raise ValueError(
            f"the name {name[:MAX_QUOTED]!r} is not a plain word: at most {MAX_NAME} printable characters, "
            "without / and \\, not beginning with a dot"
        )


def same_name(name: str) -> str:
    """Return the form of a name in which names that look alike by case, width or ligatures are equal."""
    return unicodedata.normalize("NFKC", name).casefold()


def _is_shown(character: str) -> bool:
    return character.isprintable() or character in "\n\t" or unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
