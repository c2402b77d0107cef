"""The journal of rounds: what it keeps and what it refuses."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from fedspeed.checkpoint.journal import Journal, changes
from fedspeed.errors import EXIT_USAGE, JournalError
from tests.checkpoint.entries import entry, round_folders, same, tensors

REMEDY = "or start anew with --fresh"


# What is kept.


def test_an_entry_comes_back_as_it_was(tmp_path):
    journal = Journal(tmp_path, keep=2)
    assert journal.latest() is None and journal.newest() == -1
    journal.commit(entry(0), tensors(0))
    first = Journal(tmp_path, keep=2).latest()
    assert (first.round, first.best_round, first.best_loss, first.done) == (0, 0, float("inf"), "")
    journal.commit(entry(1, best_round=1, best_loss=0.1 + 0.2, stale=3, done="early stop"), tensors(1))
    again = Journal(tmp_path, keep=2)
    latest = again.latest()
    assert latest == entry(
        1, best_round=1, best_loss=0.1 + 0.2, stale=3, done="early stop", sha256=latest.sha256
    )
    assert latest.config == {"run": {"seed": 7}}
    assert same(again.tensors(latest), tensors(1)) and again.newest() == 1


@pytest.mark.parametrize("keep", [1, 3])
def test_old_rounds_are_forgotten(tmp_path, keep):
    journal = Journal(tmp_path, keep)
    numbers = [0, 1, 2, 5, 6, 9]
    for number in numbers:
        journal.commit(entry(number), tensors(number))
    assert round_folders(journal) == [f"round-{n:06d}" for n in numbers[-keep:]]
    shutil.rmtree(journal.folder / "round-000009")  # what the remedy of a damaged round says
    assert keep == 1 or Journal(tmp_path, keep).latest().round == 6


def test_half_rounds_of_killed_processes_are_forgotten_too(tmp_path):
    journal = Journal(tmp_path, keep=1)
    journal.save_client(3, 0, tensors(3))  # never committed
    journal.commit(entry(4), tensors(4))
    assert round_folders(journal) == ["round-000004"]


def test_the_best_round_is_kept_beside_the_newest(tmp_path):
    journal = Journal(tmp_path, keep=1)
    for number in range(4):
        if number == 1:
            journal.save_best(1, tensors(1))
        journal.commit(entry(number, best_round=min(number, 1), best_loss=0.5), tensors(number))
    assert same(Journal(tmp_path, 1).load_best(1), tensors(1))


def test_the_start_can_be_the_best(tmp_path):
    """A best round 0 differs from a run in which nothing has been evaluated."""
    journal = Journal(tmp_path, keep=1)
    journal.save_best(0, tensors(0))
    for number in range(4):
        journal.commit(entry(number, best_round=0, best_loss=0.5), tensors(number))
    newest = Journal(tmp_path, 1).latest()
    assert newest.has_best and newest.best_loss == 0.5 and same(journal.load_best(0), tensors(0))
    journal.commit(entry(4), tensors(4))
    assert not journal.latest().has_best


def test_going_back_a_round_goes_back_to_its_best(tmp_path):
    """It happens when a damaged round is deleted, and after a crash between writing the best weights of a
    round and its commit.
    """
    journal = Journal(tmp_path, keep=2)
    for number in (1, 2, 3):
        journal.save_best(number, tensors(number))
        journal.commit(entry(number, best_round=number, best_loss=1 / number), tensors(number))
    assert sorted(p.name for p in journal.folder.glob("best*")) == [
        "best-000002.safetensors",
        "best-000003.safetensors",
    ]
    shutil.rmtree(journal.folder / "round-000003")
    earlier = Journal(tmp_path, keep=2).latest()
    assert earlier.best_round == 2 and same(journal.load_best(earlier.best_round), tensors(2))


def test_leftovers_of_a_killed_write_of_the_best_are_removed(tmp_path):
    journal = Journal(tmp_path, keep=1)
    journal.folder.mkdir()
    (journal.folder / ".best-000001.safetensors.4711.tmp").write_bytes(b"half")
    journal.save_best(1, tensors(1))
    journal.commit(entry(1, best_round=1, best_loss=0.5), tensors(1))
    assert sorted(p.name for p in journal.folder.iterdir()) == ["best-000001.safetensors", "round-000001"]


def test_clients_keep_their_optimizers_by_round(tmp_path):
    journal = Journal(tmp_path, keep=2)
    for number in (1, 2, 3):
        for client in (0, 4):
            journal.save_client(
                number, client, {"w/exp_avg": np.full(3, 10 * number + client, dtype=np.float32)}
            )
        journal.commit(entry(number), tensors(number))
    for number in (2, 3):
        assert journal.load_client(number, 4)["w/exp_avg"].tolist() == [10 * number + 4] * 3
    assert not (journal.folder / "round-000001").exists()


def test_a_client_that_was_never_asked_has_an_empty_optimizer(tmp_path):
    journal = Journal(tmp_path, keep=1)
    journal.save_client(2, 1, {})
    assert journal.load_client(2, 1) == {}


@pytest.mark.parametrize(("keep", "step"), [(1, 1), (1, 5), (2, 5), (3, 1)])
def test_a_host_that_does_not_commit_keeps_what_a_resume_may_need(tmp_path, keep, step):
    """Until the reporter has committed, the round to resume from is an earlier one; with checkpoint.every=5
    that is round - 5.
    """
    journal = Journal(tmp_path, keep)
    numbers = list(range(step, 8 * step, step))
    for number in numbers:
        journal.save_client(number, 0, tensors(number))
    assert round_folders(journal) == [f"round-{n:06d}" for n in numbers[-(keep + 1) :]]
    assert same(journal.load_client(numbers[-2], 0), tensors(numbers[-2]))


def test_adding_a_client_leaves_committed_rounds_to_the_reporter(tmp_path):
    """On a shared disk the gateways see the reporter's rounds."""
    journal = Journal(tmp_path, keep=1)
    for number in (1, 2):
        journal.commit(entry(number), tensors(number))
    Journal(tmp_path, keep=1).save_client(7, 1, tensors(7))
    Journal(tmp_path, keep=1).save_client(8, 1, tensors(8))
    assert journal.latest().round == 2


# What is refused. Each error names the file and what to do, and none ends as an empty journal.


@pytest.fixture
def two_rounds(tmp_path):
    journal = Journal(tmp_path, keep=2)
    journal.save_best(3, tensors(3))
    for number in (3, 4):
        journal.save_client(number, 1, tensors(number))
        journal.commit(entry(number, best_round=3, best_loss=0.5), tensors(number))
    return journal


def refusal(call, *arguments):
    with pytest.raises(JournalError) as caught:
        call(*arguments)
    assert caught.value.exit_code == EXIT_USAGE
    return str(caught.value)


def truncate(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_state(two_rounds, share):
    folder = two_rounds.folder / "round-000004"
    truncate(folder / "state.safetensors", share)
    assert re.fullmatch(
        rf"{folder}/state.safetensors: damaged .*; delete the folder {folder} to resume from round 3, "
        rf"{REMEDY}",
        refusal(two_rounds.latest),
    )


def test_one_flipped_bit_of_the_state(two_rounds):
    path = two_rounds.folder / "round-000004" / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    assert "damaged (sha256 is " in refusal(two_rounds.latest)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"round": 4',
        b"[]",
        b"7",
        b'"text"',
        b"null",
        b"{}",
        b'{"best_loss": 1.0}',
        b'{"best_loss": 1, "x": 2}',
        b"\xff\xfe",
    ],
)
def test_damaged_entry(two_rounds, content):
    folder = two_rounds.folder / "round-000004"
    (folder / "entry.json").write_bytes(content)
    assert re.fullmatch(
        rf"(?s){folder}/entry.json: damaged .*; delete the folder {folder} to resume from round 3, {REMEDY}",
        refusal(two_rounds.latest),
    )


def test_the_remedy_is_true(two_rounds):
    """Deleting the damaged round resumes from the one before, and from the beginning where there is none."""
    truncate(two_rounds.folder / "round-000004" / "state.safetensors")
    refusal(two_rounds.latest)
    shutil.rmtree(two_rounds.folder / "round-000004")
    assert two_rounds.latest().round == 3 and same(two_rounds.tensors(two_rounds.latest()), tensors(3))
    truncate(two_rounds.folder / "round-000003" / "entry.json")
    assert "to resume from the beginning" in refusal(two_rounds.latest)
    shutil.rmtree(two_rounds.folder / "round-000003")
    assert two_rounds.latest() is None


def test_missing_state(two_rounds):
    (two_rounds.folder / "round-000004" / "state.safetensors").unlink()
    assert "damaged (sha256 is no file" in refusal(two_rounds.latest)


def test_lost_or_truncated_best(two_rounds):
    path = two_rounds.folder / "best-000003.safetensors"
    truncate(path)
    assert re.fullmatch(
        rf"{path}: cannot be read .*; copy this file back .*{REMEDY}", refusal(two_rounds.load_best, 3)
    )
    assert refusal(two_rounds.check_best, two_rounds.latest()) == refusal(two_rounds.load_best, 3)
    path.unlink()
    for text in (refusal(two_rounds.load_best, 3), refusal(two_rounds.check_best, two_rounds.latest())):
        assert str(path) in text and REMEDY in text and "delete" not in text, (
            "deleting its folder would delete the journal"
        )


def test_the_best_of_another_model(two_rounds):
    """Names and shapes are compared, not values."""
    two_rounds.save_best(3, {"a": np.ones((50, 2), dtype=np.float32)})
    two_rounds.check_best(two_rounds.latest())
    for other in ({"a": np.ones((50, 3), dtype=np.float32)}, {"b": np.ones((50, 2), dtype=np.float32)}, {}):
        two_rounds.save_best(3, other)
        assert "best-000003.safetensors: holds other tensors than" in refusal(
            two_rounds.check_best, two_rounds.latest()
        )


def test_lost_or_truncated_client(two_rounds):
    path = two_rounds.folder / "round-000004" / "client-1.safetensors"
    truncate(path)
    assert re.fullmatch(
        rf"{path}: cannot be read .*; delete the folder {path.parent} on the first host .*{REMEDY}",
        refusal(two_rounds.load_client, 4, 1),
    )
    path.unlink()
    text = refusal(two_rounds.load_client, 4, 1)
    assert str(path) in text and "client 1" in text and "same hosts" in text and REMEDY in text


def test_changes_name_every_value_that_differs():
    old = {"run": {"seed": 0}, "train": {"lr": 0.1, "momentum": 0.9}, "gone": 1}
    new = {"run": {"seed": 0}, "train": {"lr": 0.2, "momentum": 0.9}, "came": [2]}
    assert changes(old, new) == ["came: None -> [2]", "gone: 1 -> None", "train.lr: 0.1 -> 0.2"]
    assert changes(old, old) == []


def test_an_entry_of_an_earlier_version_gets_a_certificate(tmp_path):
    journal = Journal(tmp_path, 2)
    journal.commit(entry(3, best_round=2, best_loss=0.5), tensors(3))
    old = journal.latest()
    path = journal.folder / "round-000003" / "entry.json"
    values = json.loads(path.read_text())
    del values["certificate"]
    path.write_text(json.dumps(values))
    assert journal.latest() == old and old.certificate == ""
    journal.add_certificate(old, "ab12")
    assert journal.latest() == replace(old, certificate="ab12")
    journal.commit(replace(entry(4), certificate="cd34"), tensors(4))
    assert journal.latest().certificate == "cd34"
