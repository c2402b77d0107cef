"""Rounds in which a client diverges, and rounds in which clients take different numbers of steps. Real
engines, processes and exchanges.
"""

import numpy as np
import pytest

from fedspeed.federation import pacing
from tests.federation import runs
from tests.federation.runs import (
    Notes,
    course,
    federation,
    largest,
    run_worlds,
    same_bits,
    settings,
    share_of,
)
from tests.federation.scenarios import two_rounds


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return runs.tiny_llama(tmp_path_factory.mktemp("base") / "llama")


# A client whose weights are no numbers any more.


class Diverging(Notes):
    """Makes this rank's client end round 1 with NaN."""

    def step(self, round_number, local_step, local_steps, loss=None):
        if round_number == 1 and local_step == local_steps:
            self.engine.load({n: t.detach() * float("nan") for n, t in self.engine.state().items()})
        super().step(round_number, local_step, local_steps, loss)


@pytest.fixture(scope="module")
def diverged(base, tmp_path_factory):
    return run_worlds((2,), diverging, base, str(tmp_path_factory.mktemp("diverged")))


def diverging(world, base, folder):
    from fedspeed.federation.run_progress import Progress

    carries = {0: (0, 2), 1: (1,)}
    seen = course(
        world,
        "diverging",
        two_rounds(base),
        carries=carries,
        folder=folder,
        kind="zero3",
        notes=Diverging() if world.rank == 1 else None,
    )
    with federation(world, "sound", two_rounds(base), carries=carries, folder=folder, kind="zero3") as fed:
        expected = fed.run(Progress(1, seen.states[1], {})).state
    return seen, expected


def test_an_update_that_is_no_number_is_left_out_and_reported(diverged):
    seen = diverged[0][0]
    assert [(r.clients, r.received, r.missing) for r in seen.records[1:]] == [(3, 2, (1,)), (3, 3, ())]
    ends = dict(zip((0, 2), seen.turns))
    whole = sum(share_of(c) for c in ends)
    for name, tensor in seen.states[1].items():
        expected = sum(share_of(c) / whole * end[name].astype(np.float64) for c, end in ends.items())
        np.testing.assert_allclose(tensor, expected, rtol=0, atol=1e-6)


def test_a_client_that_diverged_is_whole_again_in_the_next_round(diverged):
    """Nothing of it may stay behind: optimizer state, gradients of the passes it idled through, a step left
    out.
    """
    for seen, expected in diverged:
        assert same_bits(seen.states[2], expected)


# Rounds in which clients take different numbers of steps.


class StepClock:
    """A clock that only local steps move on: what a rank does in a round of seconds must not depend on how
    busy this machine is.
    """

    def __init__(self, step_s: float):
        self._now = 0.0
        self._step_s = step_s

    def perf_counter(self) -> float:
        return self._now

    def timed(self, train_step):
        """The same local step, which takes its time by this clock."""

        def step(*work):
            self._now += self._step_s
            return train_step(*work)

        return step


def unlike_steps(world, base, folder, budget):
    config = settings(
        base,
        clients=2,
        train={
            "local_steps": 8,
            "momentum": 0.0,
            "lr": 0.01,
            **({} if budget else {"local_steps_by_cluster": {"cluster1": 2}}),
        },
        federation={
            "rounds": 4 if budget else 1,
            **({"round_budget": "seconds", "round_seconds": 0.6} if budget else {}),
        },
    )
    notes = Notes()
    clock = StepClock(0.125 if world.cluster else 0.25)
    with (
        federation(world, f"uneven{budget}", config, {0: (0,), 1: (1,)}, folder, notes=notes) as fed,
        pytest.MonkeyPatch.context() as patch,
    ):
        if budget:
            patch.setattr(pacing, "time", clock)
            patch.setattr(fed.engine, "step", clock.timed(fed.engine.step))
        first = runs.begin(fed)
        start = dict(first.state)
        end = fed.run(first).state
    return start, end, notes.records


def test_clients_count_by_their_rows_however_many_steps_they_take(tmp_path):
    """Against FedNova by hand: the mean change of a step, times the mean number of steps."""
    base = runs.tiny_llama(tmp_path / "llama")
    (start, end, _), _ = run_worlds((1, 1), unlike_steps, base, str(tmp_path), 0)
    expected = run_worlds((1,), by_hand, base, start)[0]
    assert largest(end, expected) < 1e-5 < largest(end, start) / 100


def by_hand(world, base, start):
    from tests.federation.plain import Plain

    config = settings(base, clients=2, train={"local_steps": 8, "momentum": 0.0, "lr": 0.01})
    plain = Plain(config)
    shares = [share_of(c) / (share_of(0) + share_of(1)) for c in (0, 1)]
    steps = (8, 2)
    mean = {n: np.zeros(t.shape) for n, t in start.items()}
    for client in (0, 1):
        plain.load(start)
        plain.local_steps(client, 0, steps[client])
        for name, tensor in plain.state().items():
            mean[name] += shares[client] / steps[client] * (tensor.astype(np.float64) - start[name])
    return {
        n: (start[n] + sum(p * k for p, k in zip(shares, steps)) * mean[n]).astype(np.float32) for n in start
    }


def test_a_budget_of_seconds_lets_the_fast_take_more_steps(tmp_path):
    (_, end, records), (_, other, _) = run_worlds(
        (1, 1), unlike_steps, runs.tiny_llama(tmp_path / "llama"), str(tmp_path), 1
    )
    taken = [[client.local_steps for client in record.per_client] for record in records[1:]]
    assert taken == [[2, 2], [2, 4], [2, 4], [2, 4]]  # at first nobody knows how long a step takes
    assert same_bits(end, other)
