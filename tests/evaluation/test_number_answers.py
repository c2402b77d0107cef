"""The number that an answer states, on outputs written by hand."""

from decimal import Decimal

import pytest

from fedspeed.evaluation.number_answers import extract_number, same_number

OUTPUTS = [
    ("There are 3 + 2 = 5 cars. The answer is 5.", "5"),
    ("the answer is 39", "39"),
    ("THE ANSWER IS: 8", "8"),
    ("So The Answer Is\n12", "12"),
    ("The answer is $18.", "18"),
    ("The answer is 18 dollars, not 20.", "18"),
    ("The answer is 1,234,567.", "1234567"),
    ("The answer is 72.00", "72"),
    ("The answer is 0.50 dollars.", "0.5"),
    ("The answer is -7.", "-7"),
    ("The answer is -$7.", "-7"),
    ("The answer is $-7.", "-7"),
    ("The answer is \u22127 degrees.", "-7"),
    ("The answer is **42**.", "42"),
    ("The answer is 42%.", "42"),
    ("The answer is 6. The answer is 9.", "6"),
    ("The answer is 5.\n\nQ: There are 9 apples.", "5"),
    ("The answer is not known, but 3 of them left, 4 stayed.", "3"),
    ("There are 7 left. The answer is seven.", "7"),  # no number follows: the last number of the text
    ("She has 4 left.\n#### 4", "4"),
    ("#### 1,000", "1000"),
    ("####-3", "-3"),
    ("2 * 3 = <<2*3=6>>6\n#### 6 eggs, 12 eggs", "6"),
    ("The answer is 10.\n#### 11", "10"),
    ("Hence \\boxed{72}, as 2 was asked for.", "72"),
    ("\\boxed{1} is wrong, rather \\boxed{ 2 } of 3", "2"),
    ("\\boxed{\\$1{,}250} in 12 months", "1250"),
    ("\\boxed{x} or 15", "15"),
    ("#### 5 and \\boxed{6}", "5"),
    ("He pays 3 dollars, then 4 dollars more, so 7 dollars.", "7"),
    ("5-3", "3"),
    ("5 - 3 = 2", "2"),
    ("(2+3)-4", "4"),
    ("It costs $1,299.99.", "1299.99"),
    ("He has 1, 2 or 3", "3"),
    (".5 of them", "0.5"),
    ("007", "7"),
    ("I do not know.", None),
    ("", None),
    ("The answer is -.", None),
]


def test_forty_outputs_are_covered():
    assert len(OUTPUTS) == len(dict(OUTPUTS)) == 40


@pytest.mark.parametrize(("output", "number"), OUTPUTS)
def test_the_stated_number(output, number):
    expected = None if number is None else Decimal(number)
    assert extract_number(output) == expected
    assert number is None or same_number(output, expected)
    assert not same_number(output, Decimal("123456"))


def test_long_numbers_are_exact():
    assert extract_number("9" * 5000) == Decimal("9" * 5000)
    assert not same_number("1" + "0" * 4999 + "1", Decimal("1" + "0" * 5000))
