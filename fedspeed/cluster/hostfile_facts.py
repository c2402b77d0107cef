"""The keys of fact lines in hostfiles, and how each value is read.

A reader raises ValueError with the end of a message: `gpu_mem_gib=big of host alpha is not a number`.
"""

import difflib
import math
import re
from collections.abc import Callable
from typing import Any

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def _word(text: str) -> str:
    if not NAME.fullmatch(text):
        raise ValueError("is no plain word; use letters, digits, `.`, `-` and `_`")
    return text


def _folder(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError("is not an absolute path; ranks do not share a working folder on every host")
    return text


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("is not a number; write it without a unit") from None
    if not math.isfinite(value) or value <= 0:
        raise ValueError("must be above 0")
    return value


def _trust(text: str) -> str:
    if text not in ("separate", "shared"):
        raise ValueError("must be `separate` or `shared`")
    return text


def _role(text: str) -> str:
    if text not in ("client", "server"):
        raise ValueError("must be `client` or `server`")
    return text


_HARDWARE: dict[str, Callable[[str], Any]] = {
    "gpu": _word,
    "gpu_mem_gib": _positive,
    "ram_gib": _positive,
    "nvme": _folder,
    "link_gbps": _positive,
}
HOST_FACTS: dict[str, Callable[[str], Any]] = {"cluster": _word, "role": _role, **_HARDWARE}
CLUSTER_FACTS: dict[str, Callable[[str], Any]] = {**_HARDWARE, "trust": _trust}


def key_hint(word: str, key: str) -> str:
    """Return the remedy for an unknown key of a `fed-host` or `fed-cluster` line."""
    readers = HOST_FACTS if word == "fed-host" else CLUSTER_FACTS
    others = CLUSTER_FACTS if word == "fed-host" else HOST_FACTS
    if key in others:
        return f"it is a fact of a `# {'fed-cluster' if word == 'fed-host' else 'fed-host'}` line"
    near = difflib.get_close_matches(key, readers, n=1)
    return f"did you mean `{near[0]}`?" if near else f"known are {', '.join(readers)}"
