"""What is kept of rounds, and how it is written."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from fedspeed.federation import run_progress
from fedspeed.federation.methods.base import Method, method_class
from fedspeed.federation.role import RankRole
from fedspeed.federation.run_progress import Progress, ProgressWriter
from tests.federation.runs import same_bits
from tests.tiny import run_config

A = {"w": np.ones(2, np.float32)}
B = {"w": np.zeros(2, np.float32)}


class Remembering(method_class("lora_average")):
    keeps_memory = True


class Saved:
    """A journal that notes what is saved."""

    def __init__(self):
        self.best = []
        self.entries = []

    def save_best(self, number, state):
        self.best.append(number)

    def commit(self, entry, tensors):
        self.entries.append((entry, tensors))


def test_what_is_packed_for_the_journal_comes_back():
    moments = {"m": {"w": A["w"] * 2}, "v": {"w": A["w"] * 3}}
    packed = run_progress.pack(A, moments, B)
    assert sorted(packed) == ["global/w", "previous/w", "server/m/w", "server/v/w"], (
        "names that journals of earlier versions have"
    )
    state, back, previous = run_progress.unpack(packed)
    assert (
        same_bits(state, A)
        and same_bits(previous, B)
        and all(same_bits(back[m], moments[m]) for m in moments)
    )
    assert run_progress.unpack(run_progress.pack(A, {}))[2] is None


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({}, None), ({"local_optimizer": "keep"}, "optimizers"), ({"staleness": 1}, "starts")],
)
def test_what_a_client_alone_goes_on_with_comes_back(settings, kept):
    config = run_config(federation=settings)
    progress = Progress(
        3, A, {}, optimizers={0: {"w/exp_avg": A["w"]}}, starts={0: dict(B)}, memory={0: {"w": A["w"] * 5}}
    )
    packed = run_progress.pack_client(config, progress, 0)
    own = {None: [], "optimizers": ["w/exp_avg"], "starts": ["w"]}[kept]
    assert sorted(packed) == sorted([*own, "memory/w"])
    back = Progress(3, A, {})
    run_progress.unpack_client(config, back, 0, packed)
    run_progress.unpack_client(config, back, 1, {})
    assert same_bits(back.memory[0], progress.memory[0]) and set(back.memory) == {0}
    for name in ("optimizers", "starts"):
        assert set(getattr(back, name)) == ({0} if name == kept else set())


def test_what_clients_had_in_the_best_round_comes_back():
    """In a file of its own name only where it is another than what they go on with."""
    config = run_config()
    best = {"w": A["w"] * 5}
    now = {"w": A["w"] * 6}
    progress = Progress(2, A, {}, memory={0: best})
    progress_writer(Saved()).note_loss(progress, 1.0)
    progress.memory = {0: now}
    for round, names in ((2, ["memory/w"]), (3, ["best/w", "memory/w"])):
        progress.round = round
        packed = run_progress.pack_client(config, progress, 0)
        assert sorted(packed) == names
        back = Progress(round, A, {}, best_round=2)
        run_progress.unpack_client(config, back, 0, packed)
        assert same_bits(back.memory[0], now) and same_bits(back.best_memory[0], now if round == 2 else best)


@pytest.mark.parametrize(
    ("settings", "method", "keeps"),
    [
        ({}, Method, False),
        ({"local_optimizer": "keep"}, Method, True),
        ({"staleness": 1}, Method, True),
        ({}, Remembering, True),
    ],
)
def test_clients_have_files_where_they_have_something_to_go_on_with(settings, method, keeps):
    assert run_progress.stores_clients(run_config(federation=settings), method) == keeps


def test_what_tells_an_update_is_not_written_where_it_is_a_secret():
    config = run_config(federation={"staleness": 1}, routing={"mode": "mask"})
    assert not run_progress.stores_starts(config) and not run_progress.stores_clients(config, Method)


@pytest.mark.parametrize(
    ("round", "stale", "why"),
    [(4, 0, ""), (5, 0, "finished"), (5, 9, "finished"), (4, 2, "early stop"), (4, 1, "")],
)
def test_why_a_run_is_over(round, stale, why):
    assert run_progress.ending(round, stale, rounds=5, patience=2) == why
    assert run_progress.ending(4, 9, rounds=5, patience=0) == ""


def progress_writer(journal, **settings):
    role = RankRole(clients={}, reporter=True)
    return ProgressWriter(
        run_config(federation=settings),
        role,
        journal,
        method=SimpleNamespace(),
        fingerprint="marks",
        record={"key": 1},
    )


def test_the_best_round_is_the_one_with_the_least_loss():
    journal = Saved()
    progress = Progress(0, A, {})
    kept = progress_writer(journal)
    for round, loss in enumerate([2.0, 2.0, math.nan, None, 1.0, 1.5]):
        progress.round = round
        kept.note_loss(progress, loss)
    assert (progress.best_round, progress.best_loss, progress.stale, journal.best) == (4, 1.0, 1, [0, 4])


def test_an_entry_tells_all_that_a_resumed_run_needs():
    journal = Saved()
    progress = replace(
        Progress(2, A, {"m": B}), best_round=1, best_loss=0.5, stale=1, update_alignment=0.25, previous=B
    )
    with progress_writer(journal, staleness=1) as kept:
        kept.commit(progress)
    ((entry, tensors),) = journal.entries
    assert (
        entry.round,
        entry.fingerprint,
        entry.best_round,
        entry.best_loss,
        entry.stale,
        entry.likeness,
    ) == (2, "marks", 1, 0.5, 1, 0.25)
    assert entry.config == {"key": 1} and sorted(tensors) == ["global/w", "previous/w", "server/m/w"]


def test_a_background_commit_that_fails_is_reported():
    journal = Saved()
    journal.commit = lambda *_: (_ for _ in ()).throw(OSError("no space"))
    kept = progress_writer(journal, staleness=1)
    with pytest.raises(OSError, match="no space"), kept:
        kept.commit(Progress(1, A, {}))
