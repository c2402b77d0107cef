"""A run that was interrupted and resumed equals one that was not, bit for bit: whatever a round changes is in
the journal.
"""

import numpy as np
import pytest

from tests.federation.labelled import Labelled
from tests.federation.runs import (
    Notes,
    begin,
    federation,
    from_journal,
    largest,
    run_worlds,
    same_bits,
    settings,
    share_of,
    tiny_llama,
)
from tests.processes import Scenarios

ALONE = {0: (0, 1, 2)}
SKIPPED = ("update of round 2",)
# each with state of its own: server moments, held factors, kept optimizers, clients that were never asked
CASES = {
    "server moments": (
        "zero0",
        {
            "train": {},
            "federation": {
                "server_optimizer": "yogi",
                "server_lr": 0.02,
                "method": {"name": "lora_average", "rule": "alternate"},
            },
        },
    ),
    "kept sgd": ("zero0", {"train": {}, "federation": {"local_optimizer": "keep", "clients_per_round": 1}}),
    "kept adamw": (
        "zero0",
        {
            "train": {"optimizer": "adamw", "momentum": 0.0, "lr": 0.01},
            "federation": {"local_optimizer": "keep"},
        },
    ),
    "kept zero3": (
        "zero3",
        {
            "train": {"optimizer": "adamw", "momentum": 0.0, "lr": 0.01},
            "federation": {"local_optimizer": "keep", "clients_per_round": 2},
        },
    ),
    "dropout": (
        "zero2",
        {
            "train": {"schedule": "cosine", "warmup_steps": 3},
            "adapter": {"dropout": 0.2},
            "federation": {"method": {"name": "flexlora"}},
        },
    ),
    "folded": ("ram", {"train": {}, "federation": {"method": {"name": "residual"}, "clients_per_round": 2}}),
    "stale memory": (
        "zero0",
        {"train": {"momentum": 0.0}, "federation": {"staleness": 1, "method": {"name": "scaffold"}}},
    ),
    "skipped memory": (
        "zero0",
        {"train": {"momentum": 0.0}, "federation": {"method": {"name": "scaffold"}}, "skipped": SKIPPED},
    ),
    "skipped stale memory": (
        "zero0",
        {
            "train": {"momentum": 0.0},
            "federation": {"staleness": 1, "method": {"name": "scaffold"}},
            "skipped": SKIPPED,
        },
    ),
    "memory": ("ram", {"train": {}, "federation": {"method": {"name": "fedsa"}, "clients_per_round": 2}}),
    "proximal": ("zero2", {"train": {}, "federation": {"method": {"name": "fedprox"}}}),
    "zero-order": ("zero0", {"train": {"momentum": 0.0}, "federation": {"method": {"name": "fedkseed"}}}),
    "stale": (
        "zero0",
        {"train": {}, "federation": {"staleness": 1, "server_optimizer": "momentum", "server_lr": 0.5}},
    ),
}


def late_by_one(world, base, folder):
    from tests.federation import plain

    config = settings(base, federation={"rounds": 4, "staleness": 1})
    with federation(world, "late", config, carries=ALONE, folder=folder, kind="zero0") as fed:
        first = begin(fed)
        start = dict(first.state)
        end = fed.run(first).state
    expected = plain.fedavg(config, start)
    return largest(end, expected), largest(end, plain.fedavg(settings(base, federation={"rounds": 4}), start))


def test_staleness_is_federated_averaging_a_round_late(tmp_path):
    ((off, from_prompt),) = run_worlds((1,), late_by_one, tiny_llama(tmp_path / "llama"), str(tmp_path))
    assert off < 1e-5 and from_prompt > 100 * off, "late is not the same as in time"


def one_client(world, base, folder):
    """(in time, late) ends of a federation of one, with a step size that is close to what it bears."""
    ends = []
    for stale in (0, 1):
        config = settings(
            base, clients=1, train={"momentum": 0.0, "lr": 0.3}, federation={"rounds": 6, "staleness": stale}
        )
        with federation(world, f"one{stale}", config, carries={0: (0,)}, folder=folder, kind="zero0") as fed:
            ends.append(fed.run(begin(fed)).state)
    return ends


def test_nothing_is_late_for_one_who_is_alone(tmp_path):
    """Its own update is foreseen exactly: the correction undoes the delay."""
    ((in_time, late),) = run_worlds((1,), one_client, tiny_llama(tmp_path / "llama"), str(tmp_path))
    assert largest(late, in_time) < 1e-5


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    base = tiny_llama(tmp_path_factory.mktemp("base") / "llama")
    return run_worlds((1,), all_cases, base, str(tmp_path_factory.mktemp("resume")))[0]


def all_cases(world, base, folder):
    out = Scenarios()
    for name in CASES:
        out.play(name, once_and_again, world, base, folder, case=name)
    return out


def once_and_again(world, base, folder, *, case):
    """Return the run of a case at once, the same one interrupted after two rounds, and its resumption."""
    kind, sections = CASES[case]
    config = settings(
        base,
        train=sections["train"],
        adapter=sections.get("adapter"),
        federation={"rounds": 4, **sections["federation"]},
    )
    labels = []
    options = {
        "carries": ALONE,
        "folder": folder,
        "kind": kind,
        "watch": lambda exchange: Labelled(exchange, labels, skipped=sections.get("skipped", ())),
    }
    with federation(world, f"{case}, at once", config, **options) as fed:
        whole = fed.run(begin(fed))
    with federation(world, case, config, stop=lambda: True, **options) as fed:
        early = begin(fed)
        while early.round < 2:
            early = fed.run(early)
    notes = Notes()
    # As a new process would do it.
    with federation(world, case, config, notes=notes, **options) as fed:
        late = fed.run(from_journal(fed))
    return {"whole": whole, "early": early, "late": late, "rounds": [r.round for r in notes.records]}


@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_uninterrupted(resumed, case):
    seen = resumed[case]
    whole = seen["whole"]
    early = seen["early"]
    late = seen["late"]
    assert (early.round, early.done) == (2, "") and (late.round, late.done) == (4, "finished")
    assert seen["rounds"] == [3, 4]
    assert same_bits(late.state, whole.state)
    assert late.moments.keys() == whole.moments.keys()
    assert all(same_bits(late.moments[m], whole.moments[m]) for m in whole.moments)
    assert late.optimizers.keys() == whole.optimizers.keys()
    assert all(same_bits(late.optimizers[c], whole.optimizers[c]) for c in whole.optimizers)
    assert late.memory.keys() == whole.memory.keys()
    assert all(same_bits(late.memory[c], whole.memory[c]) for c in whole.memory)
    assert (late.best_round, late.best_loss, late.stale) == (whole.best_round, whole.best_loss, whole.stale)


@pytest.mark.parametrize("case", ["stale memory", "skipped memory", "skipped stale memory"])
def test_the_common_control_variate_is_the_mean_of_those_that_clients_keep(resumed, case):
    """Also after a round that was skipped, which has changed neither."""
    end = resumed[case]["whole"]
    common = {n.removeprefix("control:"): t for n, t in end.state.items() if n.startswith("control:")}
    shares = {client: share_of(client) for client in end.memory}
    mean = {
        name: sum(share * end.memory[client][name] for client, share in shares.items()) / sum(shares.values())
        for name in common
    }
    assert largest(common, mean) < 1e-5 < 1e-2 < max(float(np.abs(t).max()) for t in common.values())


def ended_in_round_1(world, base, folder):
    """Return the journal entries of three starts, each ended before round 1 was, without and with
    staleness.
    """
    entries = []
    for staleness in (0, 1):
        config = settings(base, federation={"rounds": 4, "patience": 1, "staleness": staleness})
        for start in range(3):
            with federation(world, f"ended {staleness}", config, ALONE, folder) as fed:
                fed.baseline(from_journal(fed) if start else begin(fed))
                entries.append(fed.journal.latest())
    return [(entry.round, entry.best_round, entry.stale) for entry in entries]


def test_starts_that_reach_no_round_are_no_rounds_without_a_better_loss(tmp_path):
    (entries,) = run_worlds((1,), ended_in_round_1, tiny_llama(tmp_path / "llama"), str(tmp_path))
    assert entries == [(0, 0, 0)] * 6
