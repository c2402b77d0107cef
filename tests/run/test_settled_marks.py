"""The file of a site's settled marks."""

import pytest

from fedspeed.errors import JournalError
from fedspeed.routing.anonymous.settlement import Mark
from fedspeed.session.settled_marks import NAME, FileMarks

MARK = Mark(b"\1" * 32, b"\2" * 32)
OTHER = Mark(b"\3" * 32, b"\4" * 32)


def test_marks_are_found_by_the_next_start(tmp_path):
    marks = FileMarks(tmp_path)
    assert marks.get("update of round 1") is None
    marks.put("update of round 1", MARK)
    marks.put("update of round 2", OTHER)
    marks.put("update of round 2", OTHER)
    assert (tmp_path / NAME).read_text().count("\n") == 2
    again = FileMarks(tmp_path)
    assert (again.get("update of round 1"), again.get("update of round 2")) == (MARK, OTHER)


@pytest.mark.parametrize("kept", range(1, 12))
def test_an_interrupted_line_is_dropped_and_does_not_spoil_the_next(tmp_path, kept):
    marks = FileMarks(tmp_path)
    marks.put("a", MARK)
    whole = (tmp_path / NAME).read_bytes()
    marks.put("b", OTHER)
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes()[: len(whole) + kept])
    again = FileMarks(tmp_path)
    assert again.get("a") == MARK and again.get("b") is None
    again.put("b", OTHER)
    assert FileMarks(tmp_path).get("b") == OTHER


@pytest.mark.parametrize("kept", ["{", '{"label": "a", "mem'])
def test_the_first_line_may_be_the_interrupted_one(tmp_path, kept):
    (tmp_path / NAME).write_text(kept)
    FileMarks(tmp_path).put("a", MARK)
    assert FileMarks(tmp_path).get("a") == MARK


@pytest.mark.parametrize(
    "line", ["5", "null", '{"label": "a"}', '{"label": "a", "members": "x", "vector": ""}']
)
def test_a_damaged_file_is_refused(tmp_path, line):
    (tmp_path / NAME).write_text(line + "\n")
    with pytest.raises(JournalError, match=f"{NAME}.*line 1.*--fresh"):
        FileMarks(tmp_path)


def test_a_mark_that_cannot_be_written_is_an_error_with_its_file(tmp_path):
    (tmp_path / "gone").mkdir()
    marks = FileMarks(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(JournalError, match=f"{NAME}: cannot be written"):
        marks.put("a", MARK)
