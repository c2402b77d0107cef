import json
import math

import pytest

from fedspeed.errors import EXIT_USAGE, JournalError
from fedspeed.files import write_atomically
from fedspeed.monitor.round_log import RoundLog


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "rounds.jsonl"


def fill(path, make_round, rounds):
    log = RoundLog(path)
    for number in rounds:
        log.append(make_round(number))
    return log


def test_what_is_appended_is_read_back(path, make_round, make_client):
    log = RoundLog(path)
    records = (
        make_round(1, val_loss=None),
        make_round(2, train_loss=math.inf, received=2, missing=(1,), per_client=(make_client(0),)),
    )
    for record in records:
        log.append(record)
    assert log.read() == records


def test_every_line_is_strict_json(path, make_round):
    RoundLog(path).append(make_round(1, train_loss=math.nan, update_norm=-math.inf))

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_resume_drops_the_rounds_that_will_be_trained_again(path, make_round):
    fill(path, make_round, range(6))
    log = RoundLog(path, resume_round=3)
    assert [record.round for record in log.read()] == [0, 1, 2, 3]
    log.append(make_round(4))
    assert [record.round for record in RoundLog(path, resume_round=9).read()] == [0, 1, 2, 3, 4]


def test_a_fresh_start_drops_all_of_them(path, make_round):
    fill(path, make_round, range(3))
    assert RoundLog(path).read() == ()


@pytest.mark.parametrize("cut", [1, 2, 50, 200])
def test_a_last_line_that_a_crash_cut_off_is_dropped(path, make_round, cut):
    fill(path, make_round, [1, 2])
    path.write_bytes(path.read_bytes()[:-cut])
    log = RoundLog(path, resume_round=2)
    log.append(make_round(2))
    assert [record.round for record in log.read()] == [1, 2]
    assert len(path.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("damage", [b"not json\n", b"{}\n", b"\xff\xfe\n", b"[1]\n", b"\n"])
def test_a_damaged_line_in_the_middle_is_named(path, make_round, damage):
    fill(path, make_round, [1, 2])
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + damage + second)
    with pytest.raises(JournalError) as caught:
        RoundLog(path, resume_round=2)
    assert f"{path}, line 2" in str(caught.value)
    assert "move it away" in str(caught.value)
    assert caught.value.exit_code == EXIT_USAGE
    assert path.read_bytes() == first + damage + second


def test_an_interrupted_replacement_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "file"
    write_atomically(target, b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
