"""The part of `fedspeed audit` in which the coalition lies: who lies, false numbers, a client that is lost,
and what is printed.
"""

import dataclasses
import json

import numpy as np
import pytest

from fedspeed.routing.audit.adversary import Coalition
from fedspeed.routing.config import RoutingConfig
from fedspeed.session.audit_header import HEADER_ATTACKS, HeaderRehearsal
from fedspeed.session.audit_lies import liars_of, measure_loss, play_lies, render_lies

ROUTING = RoutingConfig("mix+mask")
WEIGHTS = [90.0, 100.0, 100.0, 100.0]


def updates(rounds: int = 1, shared: float = 0.0) -> list[np.ndarray]:
    """Return weighted updates of four clients, which resemble their own of other rounds.

    Args:
        shared: how much all clients have in common.
    """
    random = np.random.default_rng(0)
    kinds = shared * random.normal(size=600) + random.normal(size=(4, 600))
    rows = [kinds + 0.3 * random.normal(size=(4, 600)) for _ in range(rounds)]
    return [(100 * row).astype(np.float32) for row in rows]


@pytest.mark.parametrize(
    "coalition,liars",
    [
        (None, {0, 1}),
        (Coalition(frozenset(range(4))), {0, 1}),
        (Coalition(frozenset({3})), {3}),
        (Coalition(frozenset(range(4)), relays=frozenset({2})), {2}),
        (Coalition(frozenset({0}), frozenset({1}), frozenset({3})), {1, 3}),
        (Coalition(frozenset(range(4)), relays=frozenset({0, 1, 2})), set()),
    ],
)
def test_who_lies(coalition, liars):
    assert liars_of(coalition, 4) == liars


def headers(**config):
    """Return the results of all lies about numbers, by name."""
    routing = dataclasses.replace(ROUTING, **config)
    rehearsal = HeaderRehearsal(routing, list(updates()[0]), WEIGHTS, frozenset({0}))
    return {result.attack: result for result in rehearsal.play_all()}


def test_impossible_numbers_are_refused():
    results = headers()
    for name in ("a huge weight", "a negative weight", "another weight later", "a negative bound"):
        assert results[name].refused == results[name].honest == 3 and not results[name].succeeded
    known = {attack.name for attack in HEADER_ATTACKS if attack.limit}
    assert {name for name, result in results.items() if result.succeeded} <= known


def test_how_much_a_weight_within_the_bound_changes():
    """The largest weight counts for max_weight of the sum of weights, and for no more."""
    assert headers(max_weight=100.0)["the largest weight"].mean_error == pytest.approx(0.25, abs=1e-3)
    assert headers(max_weight=30000.0)["the largest weight"].mean_error == pytest.approx(0.99, abs=1e-3)


def test_without_checks_a_negative_weight_is_believed(monkeypatch):
    monkeypatch.setattr("fedspeed.federation.header.weight_problem", lambda *_: "")
    monkeypatch.setattr("fedspeed.federation.header.steps_problem", lambda *_: "")
    result = headers()["a negative weight"]
    assert result.succeeded and result.mean_error == pytest.approx(2.0, abs=1e-3) and not result.limit


def test_two_rounds_tell_of_a_lost_client_as_much_as_updates_are_alike():
    """If updates do not change at all, the difference of two rounds is the lost client's update."""
    same = updates()[0]
    found = measure_loss([same, same], frozenset({0}), ROUTING)
    assert found.correlation == pytest.approx(1.0) and found.of_sum < 0.8
    alike = measure_loss(updates(4), frozenset({0}), ROUTING)
    assert found.of_sum < alike.correlation < 1.0
    assert measure_loss(updates(1), frozenset({0}), ROUTING) is None


def test_the_minimum_that_keeps_one_honest_client_from_being_alone():
    """Of four, three are needed: two liars and one honest client would do."""
    assert measure_loss(updates(2), frozenset({0, 1}), ROUTING).safe_minimum == 4
    assert measure_loss(updates(2), frozenset({0}), ROUTING).safe_minimum == 0


def test_what_is_printed():
    liars = frozenset({0, 1})
    found = play_lies("mix+mask", updates()[0], WEIGHTS, ROUTING, liars)
    text = "\n".join(render_lies([found], measure_loss(updates(2), liars, ROUTING)))
    assert "clients 0, 1 of 4 lie together" in text and "MUST NOT HAPPEN" not in text
    assert "two marks" in text and "0 alone" in text and "nobody" in text
    assert "choose another run.seed" in text and "differential privacy" in text
    assert found.compromised == pytest.approx(1 / 6) and found.ground == pytest.approx(1 - (5 / 6) ** 5)
    json.dumps(dataclasses.asdict(found))
    attacks = tuple(dataclasses.replace(result, succeeded=True, limit="") for result in found.attacks[:1])
    broken = dataclasses.replace(found, attacks=attacks)
    assert "MUST NOT HAPPEN" in "\n".join(render_lies([broken], None))
    assert "no lies are played" in "\n".join(render_lies([], None))
