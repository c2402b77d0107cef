"""Staleness and pacing as functions: what a client predicts, how alike updates were, how many steps fit, who
counts for what.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from fedspeed.federation import overlap, pacing, server_optimizer
from fedspeed.federation.config import FederationConfig
from tests.tiny import run_config


def state(*values):
    return {"w": np.array(values, np.float32), "x": np.array([values[0]], np.float32)}


def delta(w, x=0.0):
    return {"w": np.array(w, np.float32), "x": np.array([x], np.float32)}


@pytest.mark.parametrize(("known", "part"), [(None, 0.25), (0.5, 0.5), (1.0, 1.0)])
def test_a_client_expects_its_share_until_it_knows_how_alike_updates_are(known, part):
    assert overlap.expected_fraction(known, clients=4) == part


def test_a_prediction_is_the_part_of_the_own_delta_by_the_server_optimizer():
    config = FederationConfig()
    now = state(1.0, 2.0)
    plain = overlap.predicted_start(config, now, {}, delta([2.0, 4.0]), fraction=0.5, frozen=frozenset())
    assert plain["w"].tolist() == [2.0, 4.0] and plain["x"].tolist() == [1.0]
    config = FederationConfig(server_optimizer="momentum", server_lr=0.5)
    moments = server_optimizer.init(config, now)
    found = overlap.predicted_start(
        config, now, moments, delta([2.0, 4.0], 6.0), fraction=0.5, frozen=frozenset({"x"})
    )
    assert found["w"].tolist() == [1.5, 3.0] and found["x"].tolist() == [1.0], (
        "what is frozen is not predicted to move"
    )
    assert all(not array.any() for array in moments["m"].values()), "nothing is spent on a prediction"


def test_updates_are_aligned_by_what_remains_of_them_in_the_mean():
    start = state(0.0, 0.0)
    ends = [{"w": np.array(w, np.float32), "x": np.zeros(1, np.float32)} for w in ([1.0, 0.0], [0.0, 1.0])]
    mean = {n: (ends[0][n] + ends[1][n]) / 2 for n in start}
    assert overlap.update_alignment(mean, start, scale=1.0, mean_square=1.0) == pytest.approx(0.5)
    assert overlap.update_alignment(ends[0], start, scale=1.0, mean_square=1.0) == 1.0
    assert overlap.update_alignment(ends[0], start, scale=0.5, mean_square=4.0) == pytest.approx(0.5)
    assert overlap.update_alignment(start, start, scale=1.0, mean_square=0.0) == 1.0, "nothing has changed"


def test_a_late_update_is_added_to_what_the_state_is_now():
    result = overlap.carried_over(state(5.0, 6.0), state(1.0, 2.0), state(2.0, 1.0))
    assert result["w"].tolist() == [6.0, 5.0] and result["x"].tolist() == [6.0]


@pytest.mark.parametrize(
    ("budget_s", "pass_s", "turns", "limit", "steps"),
    [
        (6.0, None, 2, 9, 2),  # nobody knows yet
        (6.0, None, 2, 1, 1),
        (6.0, 1.0, 2, 9, 3),
        (6.0, 1.0, 2, 2, 2),
        (0.1, 1.0, 2, 9, 1),  # one at least
        (6.0, 1.0, 0, 9, 9),  # others decide
    ],
)
def test_as_many_steps_as_fit(budget_s, pass_s, turns, limit, steps):
    assert pacing.fitting_steps(budget_s, pass_s, turns=turns, limit=limit) == steps


def test_the_mean_delta_is_scaled_to_the_mean_number_of_steps():
    """Two clients of weights 1 and 3 took 2 and 6 of 8 steps."""
    assert pacing.fednova_scale(4.0, 1 * 2 + 3 * 6, 8) == pytest.approx(5 / 8)


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({}, None),
        ({"federation": {"staleness": 1}}, 1.0),
        ({"federation": {"round_budget": "seconds", "round_seconds": 3.0}}, 2.0),
        (
            {
                "train": {"local_steps": 4, "local_steps_by_cluster": {"slow": 2}},
                "federation": {"staleness": 1},
            },
            2.0,
        ),
    ],
)
def test_deltas_are_brought_to_one_number_of_steps_where_clients_take_unequal_ones(settings, factor):
    config = run_config(**{"train": {"local_steps": 4}, **settings})
    assert pacing.Pace(config, "fast", engine=None).delta_factor(2) == factor


def test_unequal_steps_of_a_method_without_deltas_are_left_as_they_are():
    from dataclasses import replace

    from fedspeed.federation.methods.config import variant_of

    config = run_config(train={"local_steps_by_cluster": {"slow": 2}})
    config = replace(config, federation=replace(config.federation, method=variant_of("flexlora")()))
    assert pacing.Pace(config, "fast", engine=None).delta_factor(2) is None


def test_the_time_of_steps_decides_over_the_next_ones(monkeypatch):
    now = iter([10.0, 16.0])
    monkeypatch.setattr(pacing, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    config = run_config(
        train={"local_steps": 50}, federation={"round_budget": "seconds", "round_seconds": 4.0}
    )
    pace = pacing.Pace(config, "", SimpleNamespace(client_slots=2, agree_least=lambda steps: steps))
    assert pace.steps(3) == pacing.FIRST_STEPS
    with pace.measure(3, steps=6):  # three clients in two slots: 6 s for 6 steps, twice
        pass
    assert (pace.steps(3), pace.steps(2), pace.steps(0)) == (4, 8, 50)


@pytest.mark.parametrize(("round", "is_evaluated"), [(1, False), (3, True), (4, False), (5, True)])
def test_rounds_are_evaluated_now_and_then_and_in_the_end(round, is_evaluated):
    assert pacing.is_evaluated(FederationConfig(rounds=5, evaluate_every=3), round) == is_evaluated
