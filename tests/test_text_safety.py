"""Foreign text reaches neither a terminal's escape sequences nor a reader's sense of direction."""

import pytest

from fedspeed.files import MAX_DEPTH, foreign_json
from fedspeed.log import LOG
from fedspeed.text_safety import MAX_NAME, check_name, quoted, same_name, visible

OVERRIDE = "\u202e"
HOSTILE = f"a\x1b]0;title\x07\x9b2J\r{OVERRIDE}\ud800\u200b"


def test_what_a_terminal_would_obey_is_escaped():
    assert visible(HOSTILE) == r"a\x1b]0;title\x07\x9b2J\r\u202e\ud800\u200b"
    plain = "Zürich, 東京\u3000\tγ\n\u00a0é"
    assert visible(plain) == plain


def test_a_quotation_is_one_line_of_bounded_length():
    assert quoted("a\nb\t\u3000" + OVERRIDE, 9) == r"a\nb\t\u3000\u202e"
    assert quoted("x" * 500) == "x" * 200 + "..."
    assert quoted(5) == "5"


def test_the_log_escapes_what_it_prints(capsys):
    hostile = HOSTILE.replace("\ud800", "")  # which the test runner could not pass on
    LOG.error(f"{hostile}\nsecond line")
    assert capsys.readouterr().err == f"fedspeed: error: {visible(hostile)}\nsecond line\n"


@pytest.mark.parametrize(
    "name",
    ["", ".a", "a/b", "a\\b", "..", " a", "a ", "a\n", "a\x00", "a\x1b[2J", f"a{OVERRIDE}", "a\ud800"]
    + ["a\u2028b", "a\u00a0b", "x" * (MAX_NAME + 1)],
    ids=ascii,
)
def test_a_name_that_could_mislead_is_refused_and_can_be_printed(name):
    with pytest.raises(ValueError, match="is not a plain word") as error:
        check_name(name)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["north", "Universität Zürich (2)", "東京", "x" * MAX_NAME])
def test_other_names_are_accepted(name):
    check_name(name)


def test_names_that_look_alike_are_the_same():
    assert same_name("North") == same_name("ｎｏｒｔｈ") != same_name("south")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested too deeply"),
        (b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1), "nested too deeply"),
        (b'["' + b"x" * 1_000_000 + b'"]', "1000004 bytes, of at most 1000000"),
        (b'"' + b"\\" * 900_000, "Unterminated string"),
        (b"\xff", "utf-8"),
        (b"", "Expecting value"),
        (b"9" * 5000, "a whole number of 5000 digits"),
    ],
    ids=lambda value: ascii(value[:20]),
)
def test_foreign_json_is_bounded_before_it_is_parsed(content, reason):
    with pytest.raises(ValueError, match=reason):
        foreign_json(content, 1_000_000)


def test_brackets_in_strings_are_not_nested():
    text = r'{"a": "[[[[\"[[[[", "b": [["{"]]}'.replace("[[[[", "[" * MAX_DEPTH)
    assert foreign_json(text.encode(), 1000) == {"a": "[" * MAX_DEPTH + '"' + "[" * MAX_DEPTH, "b": [["{"]]}
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert str(foreign_json(deepest.encode(), 1000)) == deepest
