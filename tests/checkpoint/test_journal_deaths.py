"""The journal can be read whenever the process that writes it dies."""

import multiprocessing
import os
import random
import signal
import time

from fedspeed.checkpoint.journal import Journal
from tests.checkpoint.entries import entry, round_folders, same, tensors


class Died(BaseException):
    pass


def whole(run):
    """Return the number of the newest round after a crash, once the journal has proved readable as it is."""
    journal = Journal(run, keep=1)
    newest = journal.latest()
    if newest is None:
        return -1
    assert same(journal.tensors(newest), tensors(newest.round))
    if newest.has_best:
        assert same(journal.load_best(newest.best_round), tensors(newest.best_round))
    return newest.round


def test_death_at_every_step_of_a_commit(tmp_path, monkeypatch):
    """The process dies at each call that changes the disk in turn; after it not even a `finally` changes
    anything.
    """
    names = [(os, "fsync"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")]
    real = {name: getattr(module, name) for module, name in names}
    calls = {"left": 0, "dead": False}

    def mortal(name):
        def call(*args, **kwargs):
            calls["left"] -= 1
            if calls["dead"] or calls["left"] < 0:
                calls["dead"] = True
                raise Died
            return real[name](*args, **kwargs)

        return call

    def fresh(run):
        journal = Journal(run, keep=1)
        journal.save_best(1, tensors(1))
        journal.commit(entry(1, best_round=1, best_loss=1.0), tensors(1))
        return journal

    outcomes = []
    step = 0
    while True:
        run = tmp_path / f"{step}"
        journal = fresh(run)
        calls.update(left=step, dead=False)
        for module, name in names:
            monkeypatch.setattr(module, name, mortal(name))
        try:
            journal.save_best(2, tensors(2))
            journal.commit(entry(2, best_round=2, best_loss=0.5), tensors(2))
        except Died:
            pass
        finally:
            monkeypatch.undo()
        outcomes.append(whole(run))
        journal.save_best(2, tensors(2))  # the resumed run does the round again
        journal.commit(entry(2, best_round=2, best_loss=0.5), tensors(2))
        assert whole(run) == 2
        if not calls["dead"]:
            break
        step += 1
    assert outcomes == sorted(outcomes) and set(outcomes) == {1, 2}, outcomes
    assert step > 10, "the calls are still the ones the journal makes"


def commit_for_ever(run, pipe):
    """Commit rounds after the newest one without end, and acknowledge each through the pipe."""
    journal = Journal(run, keep=2)
    newest = journal.latest()
    number = 0 if newest is None else newest.round
    while True:
        number += 1
        if number % 3 == 0:
            journal.save_best(number, tensors(number, 20_000))
        journal.save_client(number, 0, tensors(number, 20_000))
        journal.commit(
            entry(number, best_round=number - number % 3, best_loss=1.0 if number > 2 else float("inf")),
            tensors(number, 20_000),
        )
        pipe.send(number)


def test_kill_at_random_moments(tmp_path):
    """One journal is killed and resumed twenty times."""
    context = multiprocessing.get_context("fork")
    rng = random.Random(4)
    acknowledged = 0
    at_work = 0
    for _ in range(20):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=commit_for_ever, args=(tmp_path, theirs), daemon=True)
        process.start()
        theirs.close()
        assert ours.poll(20)
        acknowledged = ours.recv()
        time.sleep(rng.uniform(0, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        while ours.poll():
            try:
                acknowledged = ours.recv()
            except EOFError:
                break
        ours.close()
        journal = Journal(tmp_path, keep=2)
        newest = journal.latest()
        assert newest.round in (acknowledged, acknowledged + 1), (
            "committed before it was acknowledged, or not begun"
        )
        assert same(journal.tensors(newest), tensors(newest.round, 20_000))
        assert same(journal.load_client(newest.round, 0), tensors(newest.round, 20_000))
        if newest.has_best:
            assert same(journal.load_best(newest.best_round), tensors(newest.best_round, 20_000))
        assert len(round_folders(journal)) <= 4, "two that are kept, one half written, one half forgotten"
        at_work += len(round_folders(journal)) > 2 or any(
            p.suffix == ".tmp" for p in journal.folder.rglob("*")
        )
    assert at_work >= 3, "some kills must have met the journal at work"
