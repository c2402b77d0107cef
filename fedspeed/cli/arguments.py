"""Types of arguments that several commands take."""

import argparse
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent.parent
QUICKSTART = PROJECT / "ds_configs" / "quickstart.yaml"
MAX_SEED = 2**32 - 1
# The object to which a command adds its parser. argparse has no public name for it.
Commands = argparse._SubParsersAction


def file_name(text: str) -> Path:
    """Return the path that an argument names."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a file")
    return Path(text)


def seed(text: str) -> int:
    """Return the seed that an argument gives."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) <= MAX_SEED):
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not a whole number of at least 0 and at most {MAX_SEED}"
        )
    return int(text)


def positive(text: str) -> int:
    """Return the whole number of at least 1 that an argument gives."""
    if not text.isdigit() or not 0 < int(text) < 10**9:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number of at least 1")
    return int(text)


def temperature(text: str) -> float:
    """Return the temperature of sampling that an argument gives, from 0 to 100."""
    return _between(text, 0.0, 100.0)


def probability(text: str) -> float:
    """Return the probability above 0 that an argument gives."""
    return _between(text, 1e-6, 1.0)


def _between(text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not a number of at least {low:g} and at most {high:g}"
        )
    return value


def not_negative(text: str) -> int:
    """Return the whole number of at least 0 that an argument gives."""
    return 0 if text == "0" else positive(text)


def numbers(text: str) -> frozenset[int]:
    """Return the whole numbers that an argument lists with commas."""
    items = [item.strip() for item in text.split(",")]
    if not all(item.isdigit() and len(item) < 6 for item in items):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a list of whole numbers with commas")
    return frozenset(map(int, items))
