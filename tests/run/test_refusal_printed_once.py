"""With `--json`, a refusal by many ranks is printed by one rank of each host."""

import io
import json
import os
import tempfile
import threading

import pytest

from fedspeed.cli import main
from fedspeed.cluster.once_per_host import ONCE_VARIABLE, _start_time, run_once_per_host
from fedspeed.cluster.ranks import RankIdentity
from fedspeed.errors import ConfigError
from fedspeed.session import refusal
from tests.limits import LIMIT_S

RANKS = 3


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return the folder in which ranks find each other; the refusal leaves no file in it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv(ONCE_VARIABLE, raising=False)
    return tmp_path


def rank_of(number: int, local_size: int = RANKS) -> RankIdentity:
    return RankIdentity("openmpi", number, RANKS, number, local_size)


def as_rank(number: int, monkeypatch, *arguments: str) -> int:
    """Return the exit code of a command that runs as one of mpirun's ranks."""
    for name, value in {"RANK": number, "SIZE": RANKS, "LOCAL_RANK": number, "LOCAL_SIZE": RANKS}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", str(value))
    try:
        return main(arguments)
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize(
    "arguments", [["run", "--json", "--bogus"], ["run", "--json", "--config", "nosuch.yaml"]]
)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_what_all_ranks_refuse_is_reported_by_whoever_comes_first(
    folder, monkeypatch, capfd, arguments, order
):
    assert [as_rank(number, monkeypatch, *arguments) for number in order] == [2, 2, 2]
    (line,) = capfd.readouterr().out.splitlines()
    assert json.loads(line)["exit_code"] == 2
    assert list(folder.iterdir()) == []


def test_what_one_rank_alone_refuses_is_reported(folder, monkeypatch, capfd):
    assert as_rank(2, monkeypatch, "run", "--json", "--config", "nosuch.yaml") == 2
    assert "nosuch.yaml" in json.loads(capfd.readouterr().out)["error"]


def test_files_of_starts_that_are_over_are_removed(folder):
    left, other = (
        folder / f"fedspeed-reported-{os.getuid()}-{os.getpid()}-{began}"
        for began in ("0", _start_time(os.getpid()))
    )
    left.touch()
    other.touch()
    for number in range(RANKS):
        run_once_per_host(lambda: None, rank_of(number))
    assert list(folder.iterdir()) == [other]


def test_a_later_start_by_the_same_parent_is_reported_again(folder):
    printed = []
    for start in ("first", "second"):
        for number in (0, 1):  # the third is ended by its launcher before it comes
            run_once_per_host(lambda start=start: printed.append(start), rank_of(number))
    assert printed == ["first", "second"]


def test_no_rank_ends_before_the_refusal_is_printed(folder):
    begun = threading.Event()
    released = threading.Event()
    passed = []

    def print_refusal():
        begun.set()
        assert released.wait(LIMIT_S)
        passed.append("printed")

    def other(number):
        run_once_per_host(lambda: passed.append("printed twice"), rank_of(number))
        passed.append(number)

    threads = [threading.Thread(target=run_once_per_host, args=(print_refusal, rank_of(0)))]
    threads[0].start()
    assert begun.wait(LIMIT_S)
    threads += [threading.Thread(target=other, args=(number,)) for number in (1, 2)]
    for thread in threads[1:]:
        thread.start()
    assert passed == []
    released.set()
    for thread in threads:
        thread.join(LIMIT_S)
    assert passed[0] == "printed" and sorted(passed[1:]) == [1, 2]


def test_ranks_that_cannot_find_each_other_all_print_it(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    printed = []
    for number in range(RANKS):
        run_once_per_host(lambda number=number: printed.append(number), rank_of(number))
    assert printed == [0, 1, 2]


class Meeting:
    """A store in which the first to ask for a key wins, and that signals when a rank waits or has printed."""

    def __init__(self):
        self._asked = set()
        self.notes = threading.Event()
        self.lock = threading.Lock()
        self.waits = threading.Event()

    def is_first(self, key):
        with self.lock:
            first = key not in self._asked
            self._asked.add(key)
            return first

    def try_put(self, key, text):
        self.notes.set()

    def wait(self, keys, timeout_s):
        self.waits.set()
        return set() if self.notes.wait(timeout_s) else set(keys)


class Slow(io.StringIO):
    """Stand in for a stdout that accepts a text only when another rank waits for it."""

    def __init__(self, waits):
        super().__init__()
        self._waits = waits

    def write(self, text):
        assert self._waits.wait(LIMIT_S), "the other rank has gone on"
        return super().write(text)


def test_ranks_that_have_met_wait_for_the_one_that_prints(monkeypatch):
    monkeypatch.setattr(refusal, "REPORT_S", LIMIT_S)
    store = Meeting()
    out = Slow(store.waits)
    ranks = [
        threading.Thread(target=refusal.report_refusal, args=(ConfigError("x"), out, store)) for _ in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(LIMIT_S)
    assert len(out.getvalue().splitlines()) == 1


def test_another_rank_prints_for_one_that_was_killed(monkeypatch):
    monkeypatch.setattr(refusal, "REPORT_S", 0.05)
    store = Meeting()
    out = io.StringIO()
    assert store.is_first("refused")  # and is killed
    for _ in range(2):
        refusal.report_refusal(ConfigError("x"), out, store)
    assert len(out.getvalue().splitlines()) == 1
