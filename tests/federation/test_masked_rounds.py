"""What the participants of a masked run sum: a header and an update in each round. And what becomes of a run
in which one participant sends numbers that cannot be. Real engines, processes and exchanges.
"""

import contextlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedspeed.errors import FedSpeedError
from tests.federation import runs
from tests.federation.labelled import Labelled
from tests.federation.runs import Notes, begin, federation, from_journal, run_worlds, same_bits, settings
from tests.processes import Scenarios

APART = {0: (0,), 1: (1,), 2: (2,)}
MASK = {"mode": "mask", "cell_kib": 64}
LIAR = 1


def masked(base, rounds=2, train=None, **federation):
    return settings(
        base, train={"lr": 0.01, **(train or {})}, routing=MASK, federation={"rounds": rounds, **federation}
    )


def played(world, name, config, folder, lie=None, **options):
    """Run all rounds; return what was summed, the states by round, the records, how it ended, and the newest
    round in the journal.

    Args:
        lie: called with the `Federated` of the rank that lies, before the first round.
        options: of `Labelled`, on all ranks.
    """
    labels = []
    notes = Notes()
    states = []
    error = ""
    with federation(
        world,
        name,
        config,
        APART,
        folder,
        notes=notes,
        watch=lambda exchange: Labelled(exchange, labels, **options),
    ) as fed:
        progress = begin(fed)
        states.append(progress.state)
        commit = fed.parts.progress_writer.commit
        fed.parts.progress_writer.commit = lambda now: (states.append(now.state), commit(now))
        if lie is not None and world.rank == LIAR:
            lie(fed)
        try:
            progress = fed.run(progress)
        except FedSpeedError as refused:
            error = str(refused)
        entry = fed.journal.latest() if fed.role.reporter else None
    return labels, states, notes.records, error or progress.done, entry.round if entry else None


class PowerLost(Exception):
    """Ends all ranks of a run at the same moment."""


def killed_and_resumed(world, name, config, folder, dies_at):
    """Run all rounds, in a run that loses power before round `dies_at` is journalled. Keys and settled marks
    survive, as those of sites do. Return (the state at the end, the rounds that were skipped).
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from fedspeed.routing.anonymous.settlement import MemoryMarks

    survives = {
        "key": Ed25519PrivateKey.from_private_bytes(bytes([world.rank + 1]) * 32),
        "marks": MemoryMarks(),
    }

    def lose_power(progress):
        if progress.round == dies_at:
            raise PowerLost
        commit(progress)

    if dies_at:
        with federation(world, name, config, APART, folder, **survives) as fed:
            commit = fed.parts.progress_writer.commit
            fed.parts.progress_writer.commit = lose_power
            with contextlib.suppress(PowerLost):
                fed.run(begin(fed))
    notes = Notes()
    with federation(world, f"{name}, again", config, APART, folder, notes=notes, **survives) as fed:
        fed.journal.folder = Path(folder) / name / "journal"
        progress = fed.run(from_journal(fed))
    return progress.state, [record.round for record in notes.records if record.skipped]


# Ways in which one participant lies.


def counts_too_many(fed):
    recorder = fed.parts.recorder
    note_updates = recorder.note_updates

    def note(ledger, counted):
        note_updates(ledger, counted)
        ledger.add_client(LIAR, received=1000.0)

    recorder.note_updates = note


def claims_a_loss_of(loss):
    def lie(fed):
        evaluator = fed.parts.evaluators[0]

        def evaluated(*args):
            values = evaluator(*args)
            later = args[2] != "the evaluation before round 1"
            return {
                c: of | ({"val_loss": loss * of["val_tokens"]} if later else {}) for c, of in values.items()
            }

        object.__setattr__(fed.parts, "evaluators", (evaluated,))

    return lie


def renews_for_all(fed):
    from fedspeed.federation.header import Signals

    fed.parts.recorder.signals = lambda: Signals(1.0, 0.0, 1e9)


def weighs_too_much(fed):
    fed.parts.weights[LIAR] = 1e12


def weighs_less_in_the_update(label, vector, weight):
    return vector, weight - 1.0 if label.startswith("update") and weight == runs.share_of(LIAR) else weight


def updates_are_counted_after_their_sum(label, vector, weight):
    """Check that updates of a round are counted by the next header, which only those send that are left."""
    from fedspeed.federation.ledger import Ledger

    size = Ledger(3, 3, sums_only=True).vector.size
    if label.startswith("header"):
        halves = np.split(vector[5 : 5 + 2 * size], 2)
        before, after = (Ledger(3, 3, half.copy(), sums_only=True) for half in halves)
        assert before.total("asked") == 0 and after.total("asked") == float(not label.endswith(" 1")), label
    return vector, weight


def all_runs(world, base, folder):
    from fedspeed.federation.methods.config import METHODS, Entry, variant_of

    METHODS["every_step"] = Entry(
        module="tests.federation.methods.every_step", adds_deltas=True, any_weights=True, sums_only=True
    )
    stepping = masked(base)
    chosen = replace(stepping.federation, method=variant_of("every_step")())
    stepping = replace(stepping, federation=chosen)
    cases = {
        "plain": (settings(base, train={"lr": 0.01}, federation={"rounds": 2}), {}),
        "honest": (masked(base), {}),
        "overlapped": (masked(base, staleness=1), {}),
        "counted": (masked(base), {"sent": updates_are_counted_after_their_sum}),
        "every step": (stepping, {}),
        "no better": (masked(base, rounds=9, patience=2, train={"lr": 0.0}), {}),
        "skipped": (masked(base), {"skipped": ("update of round 1",)}),
        "skipped, overlapped": (masked(base, staleness=1), {"skipped": ("update of round 1",)}),
        "counts": (masked(base), {"lie": counts_too_many}),
        "loss": (masked(base), {"lie": claims_a_loss_of(-40.0)}),
        "renew": (masked(base), {"lie": renews_for_all}),
        "weight": (masked(base), {"lie": weighs_too_much}),
        "two weights": (masked(base), {"sent": weighs_less_in_the_update}),
    }
    out = Scenarios()
    for name, (config, options) in cases.items():
        out.play_together(world, name, played, name, config, folder, **options)
    for name, dies_at, staleness, every in (
        ("whole", 0, 0, 1),
        ("power lost", 3, 0, 3),
        ("power lost, overlapped", 3, 1, 1),
    ):
        config = masked(base, rounds=5, staleness=staleness)
        config = replace(config, checkpoint=replace(config.checkpoint, every=every))
        out.play_together(world, name, killed_and_resumed, name, config, folder, dies_at=dies_at)
    return out


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    base = runs.tiny_llama(tmp_path_factory.mktemp("base") / "llama")
    return run_worlds((1, 1, 1), all_runs, base, str(tmp_path_factory.mktemp("masked")))


TWO_ROUNDS = [
    "closing header of round 0",
    "header of round 1",
    "update of round 1",
    "header of round 2",
    "update of round 2",
    "closing header of round 2",
]


@pytest.mark.parametrize("case", ["honest", "overlapped", "counted"])
def test_a_round_takes_two_exchanges(seen, case):
    for rank in seen:
        assert rank[case][0] == TWO_ROUNDS and rank[case][3] == "finished"
    assert [record.round for record in seen[0][case][2]] == [0, 1, 2] and seen[0][case][4] == 2


def test_the_records_are_those_of_a_plain_run(seen):
    for hidden, clear in zip(seen[0]["honest"][2], seen[0]["plain"][2], strict=True):
        for name in ("round", "clients", "received", "tokens", "missing_count"):
            assert getattr(hidden, name) == getattr(clear, name)
        assert hidden.val_loss == pytest.approx(clear.val_loss, rel=1e-4)
        if hidden.round:
            assert hidden.train_loss == pytest.approx(clear.train_loss, rel=1e-4)
            assert (hidden.skipped, clear.skipped) == (0, 0)


def test_a_method_that_exchanges_in_every_step_has_a_header_for_each_exchange(seen):
    labels, _, records, end, _ = seen[0]["every step"]
    places = ["round 1", "round 1, exchange 2", "round 2", "round 2, exchange 2"]
    between = [f"{what} of {place}" for place in places for what in ("header", "update")]
    assert labels == ["closing header of round 0", *between, "closing header of round 2"]
    assert end == "finished" and [record.received for record in records] == [0, 3, 3]


def test_an_update_after_the_end_is_trained_but_not_sent(seen):
    """Whether the run is over is known with the header of the next round."""
    labels, _, records, end, newest = seen[0]["no better"]
    assert end == "early stop" and newest == 2 and [record.round for record in records] == [0, 1, 2]
    assert labels[-3:] == ["header of round 2", "update of round 2", "header of round 3"]


@pytest.mark.parametrize("case", ["skipped", "skipped, overlapped"])
def test_the_state_stays_in_a_round_that_is_skipped(seen, case):
    labels, states, records, end, newest = seen[0][case]
    assert labels == TWO_ROUNDS and (end, newest) == ("finished", 2)
    start, baseline, first, second = states
    assert same_bits(baseline, first) and not same_bits(first, second)
    assert [record.skipped for record in records] == [None, 1, 0]
    assert records[1].update_norm == 0 and records[1].val_loss is None and records[2].val_loss > 0
    for rank in seen:
        assert same_bits(rank[case][1][-1], second)


@pytest.mark.parametrize(
    ("case", "text", "newest"),
    [
        ("counts", "round 1: .*received sums to 1003 of 3", 0),
        ("loss", "round 1: .*val_loss sums to -", 0),
        ("renew", "the header of round 1: .*1e.09 have a newer roster", 0),
        ("weight", "the header of round 1: .*the weights of 3 participants sum to 1e.12", 0),
        ("two weights", "the update of round 1: .*the weights sum to .* in the header before it", 0),
    ],
)
def test_a_participant_that_lies_ends_the_run_before_anything_of_it_is_journalled(seen, case, text, newest):
    for rank in seen:
        assert re.match(text, rank[case][3]), rank[case][3]
        assert (
            "some participant sends impossible numbers, and a masked sum does not show which" in rank[case][3]
        )
    assert seen[0][case][4] == newest


def test_rounds_that_are_repeated_are_summed_again_to_the_last_bit(seen):
    """Three rounds are lost whose sums may have been opened. None is skipped: each is the same again."""
    for rank in seen:
        state, skipped = rank["power lost"]
        assert skipped == [] and same_bits(state, rank["whole"][0])


def test_under_staleness_a_resumed_run_skips_the_rounds_that_it_cannot_repeat(seen):
    """Predicted starts are not stored in the masked modes, so that other updates follow from the journal."""
    states = [rank["power lost, overlapped"][0] for rank in seen]
    skipped = seen[0]["power lost, overlapped"][1]
    assert skipped in ([3], [3, 4]), "round 4 had been sent, and may have been settled"
    assert all(same_bits(state, states[0]) for state in states)
