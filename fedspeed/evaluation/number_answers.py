"""The number that a written answer comes to, such as a solution of a word problem of GSM8K."""

import re
from decimal import Decimal

# Digits with or without thousands separators, and a decimal fraction. A minus directly behind a digit or a
# bracket subtracts and is no sign: "5-3".
_NUMBER = re.compile(
    r"(?:(?<![\d.)])(?P<sign>[-\u2212\u2013]))?[$\u20ac\u00a3\u00a5]?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\d)\.\d+)"
)
_ANSWER = re.compile(r"the answer is", re.IGNORECASE)
_RESULT = re.compile("####")
_BOXED = re.compile(r"\\boxed\s*\{")


def extract_number(answer: str) -> Decimal | None:
    r"""Return the number that an answer states as its result; None if it has no number.

    The first of these rules that finds a number decides:

    1. the first number after the first "the answer is", in any case (Wei et al., 2022, and the evaluation of
       FederatedScope-LLM);
    2. the first number after the first "####", with which solutions of GSM8K end;
    3. the first number in the last LaTeX box, `\boxed{72}`;
    4. the last number of the text.

    Thousands separators, currencies, units, a full stop behind the number and zeros behind the decimal point
    do not count.
    """
    text = answer.replace("{,}", ",").replace("\\$", "$").replace("\\!", "")
    after = [text[match.end() :] for rule in (_ANSWER, _RESULT) if (match := rule.search(text))]
    boxes = [text[match.end() :].split("}")[0] for match in _BOXED.finditer(text)]
    for part in [*after, *boxes[-1:]]:
        if number := _NUMBER.search(part):
            return _value(number)
    numbers = list(_NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def same_number(answer: str, expected: Decimal | None) -> bool:
    """Return whether an answer states a number as its result."""
    return expected is not None and extract_number(answer) == expected


def _value(number: re.Match[str]) -> Decimal:
    value = Decimal(number["digits"].replace(",", ""))
    return -value if number["sign"] else value
