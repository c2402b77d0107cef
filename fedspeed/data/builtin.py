"""A small generated instruction task, which needs no download: operations on words of four letters.

It lets a new machine train something real, on which a federation is better than a client alone: each category
is one instruction ("reverse dabe" -> "ebad"), so a client with only one category never sees the other
instructions. The quickstart's base is pretrained on the same skills under other, made-up instruction words.
Fine-tuning connects the task's instructions with these skills, which takes an adapter a few hundred steps.
"""

from collections.abc import Callable

import numpy as np

from fedspeed.data import streams
from fedspeed.data.rows import Row
from fedspeed.errors import DataError

DEFAULT_ROWS = 3000

_LETTERS = "abcdefgh"
_LENGTH = 4
_WORDS = len(_LETTERS) ** _LENGTH
_FOLLOWING = str.maketrans(_LETTERS, _LETTERS[1:] + _LETTERS[0])

# No two instructions begin with the same letter: a byte model then tells them apart by their first byte.
SKILLS: dict[str, Callable[[str], str]] = {
    "copy": lambda word: word,
    "double": lambda word: "".join(letter * 2 for letter in word),
    "next": lambda word: word.translate(_FOLLOWING),
    "reverse": lambda word: word[::-1],
    "last": lambda word: word[-1],
    "upper": str.upper,
}

_ALIASES_PER_SKILL = 16


def builtin_rows(seed: int, n: int) -> list[Row]:
    """Return `n` different rows, a function of the seed. Categories alternate, so their numbers of rows
    differ by at most one.

    Raises:
        DataError: there are fewer different rows than `n`.
    """
    per_skill = -(-n // len(SKILLS))
    if per_skill > _WORDS:
        raise DataError(
            f"the built-in task has {_WORDS * len(SKILLS)} different rows, {n} were asked for; lower "
            "data.max_rows"
        )
    rng = np.random.default_rng([seed, streams.BUILTIN])
    words = {skill: rng.choice(_WORDS, size=per_skill, replace=False) for skill in SKILLS}
    return [_row(skill, skill, words[skill][i]) for i in range(per_skill) for skill in SKILLS][:n]


def pretraining_rows(seed: int, n: int) -> list[Row]:
    """Return `n` rows of the same skills under made-up instruction words, none of which is an instruction of
    the task.

    Each skill has 16 words, so that the base learns to map words to skills rather than to distinguish a few
    fixed words. The loss is on the answer only, as in fine-tuning, because the letters of the input are
    random.
    """
    rng = np.random.default_rng([seed, streams.PRETRAIN])
    aliases = _aliases()
    skills = list(SKILLS)
    draws = zip(
        rng.integers(len(skills), size=n),
        rng.integers(_ALIASES_PER_SKILL, size=n),
        rng.integers(_WORDS, size=n),
    )
    return [_row(skills[skill], aliases[skills[skill]][alias], word) for skill, alias, word in draws]


def _row(skill: str, instruction: str, number: int) -> Row:
    word = "".join(_LETTERS[number // len(_LETTERS) ** place % len(_LETTERS)] for place in range(_LENGTH))
    return Row(instruction=instruction, input=word, output=SKILLS[skill](word), category=skill)


def _aliases() -> dict[str, list[str]]:
    """Return the made-up words of each skill. They do not depend on a seed, so that rows drawn with different
    seeds use the same words.
    """
    rng = np.random.default_rng(0)
    words: dict[str, None] = {}
    while len(words) < _ALIASES_PER_SKILL * len(SKILLS):
        words["".join(chr(ord("a") + letter) for letter in rng.integers(26, size=rng.integers(4, 7)))] = None
    ordered = list(words)
    return {skill: ordered[i :: len(SKILLS)] for i, skill in enumerate(SKILLS)}
