"""What several commands take: types of arguments, and words in common."""

import argparse
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent.parent
QUICKSTART = PROJECT / "ds_configs" / "quickstart.yaml"
MAX_SEED = 2**32 - 1
Commands = argparse._SubParsersAction  # what a command adds itself to; argparse has no public name for it


def file_name(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a file")
    return Path(text)


def seed(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) <= MAX_SEED):
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not a whole number of at least 0 and at most {MAX_SEED}"
        )
    return int(text)


def positive(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 10**9:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number of at least 1")
    return int(text)


def numbers(text: str) -> frozenset[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and len(word) < 6 for word in words):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a list of whole numbers with commas")
    return frozenset(map(int, words))
