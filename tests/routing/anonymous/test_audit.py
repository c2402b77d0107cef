"""The adversary: it succeeds where there is something to find, and only there."""

import numpy as np
import pytest

from fedspeed.routing.anonymous import ring
from fedspeed.routing.anonymous.masks import Masks
from fedspeed.routing.anonymous.phases import AgreedSum
from fedspeed.routing.audit.adversary import (
    Coalition,
    Linkage,
    compromised,
    link,
    named_share,
    observe,
    timing_auc,
    traced_share,
)
from fedspeed.routing.audit.linkers import LINKERS
from tests.routing.anonymous.parties import Parties
from tests.routing.anonymous.test_crypto import noise


def views(n: int, rounds: int, words: int = 96, coalition=None, **terms):
    """Of updates that resemble those of the same member in other rounds, as rows of one kind make them do."""
    random = np.random.default_rng(n)
    nature = random.normal(size=(n, words))
    parties = Parties(n, words, chunk_length=words // n, **terms)
    found = []
    for number in range(rounds):
        for i in range(n):
            out = np.empty(words, np.uint32)
            ring.encode(
                (nature[i] + 0.7 * random.normal(size=words)).astype(np.float32), 64.0 * n, noise(number), out
            )
            parties.vectors[i] = out
        found.append(observe(parties.attempt(number), coalition or Coalition(frozenset(range(n)))))
    return found


@pytest.mark.parametrize("n", [3, 8])
def test_without_masks_content_betrays_whose_it_is(n):
    found = link(views(n, 40, words=240, masked=False))
    assert found["cosine"].accuracy > 0.8 and found["greedy"].accuracy > 0.7
    assert max(outcome.upper(len(LINKERS)) for outcome in found.values()) > 0.6


@pytest.mark.parametrize("n,rounds", [(3, 250), pytest.param(8, 60, marks=pytest.mark.slow)])
def test_with_masks_all_attackers_guess(n, rounds):
    """A test with room for chance; benchmarks/linkage.py has the figures."""
    for name, outcome in link(views(n, rounds)).items():
        error = outcome.upper(1, 0.8413) - outcome.advantage
        assert abs(outcome.advantage) < 4.5 * error, name


@pytest.mark.parametrize("corrupt", [0, 1, 3])
def test_what_colluders_know_of_masks_names_nobody_else(corrupt, monkeypatch):
    coalition = Coalition(frozenset(range(5)), clients=frozenset(range(corrupt)))
    found = views(5, 25, coalition=coalition)
    share, chance = named_share(found)
    pairs = sum(len(c) for view in found for c in view.named.values())
    assert chance == 1 / (5 - corrupt) and abs(share - chance) < 4.5 / np.sqrt(pairs)
    honestly, between = (
        Masks.apply,
        frozenset(range(corrupt)),
    )  # honest members that have no masks with each other
    monkeypatch.setattr(Masks, "apply", lambda self, *where: honestly(self.known_to(between), *where))
    members = Parties(5, 96, chunk_length=20).attempt()
    for member in members:
        monkeypatch.setattr(member, "_finish", lambda member=member: agreed_on_nothing(member))
    assert named_share([observe(members, coalition)])[0] == 1.0


def agreed_on_nothing(member):
    """The masks would not cancel; what an owner sees has been seen by now."""
    return AgreedSum(np.zeros(member.parameters.length, np.uint32), member.parameters.members)
    yield


def test_a_linker_is_right_about_what_is_plain_to_see():
    random = np.random.default_rng(0)
    a = random.normal(size=(6, 300))
    order = random.permutation(6)
    b = (a + 0.05 * random.normal(size=a.shape))[order]
    for name, linker in LINKERS.items():
        assert (order[linker(a, b, random)] == np.arange(6)).mean() > (
            0.5 if name == "norms of layers" else 0.99
        ), name


def test_chance_is_no_advantage():
    random = np.random.default_rng(0)
    outcome = Linkage()
    for _ in range(4000):
        outcome.add(int((random.permutation(5) == np.arange(5)).sum()), 5)
    assert abs(outcome.advantage) < 0.02 and outcome.upper(1, 0.5) == pytest.approx(outcome.advantage)
    assert outcome.upper(6) > outcome.upper(1)


@pytest.mark.parametrize("corrupt", [0, 2, 4, 8])
def test_cells_are_followed_as_often_as_the_formula_says(corrupt):
    coalition = Coalition(frozenset(range(8)), relays=frozenset(range(corrupt)))
    share = traced_share(views(8, 25, coalition=coalition))
    assert abs(share - compromised(8, corrupt, 2)) < 0.12


def test_the_order_of_arrival_tells_nothing_unless_a_relay_keeps_it(monkeypatch):
    assert timing_auc(views(8, 4, relays=0)) == 1.0
    auc = timing_auc(views(8, 40))
    pairs = 40 * 8 * 8
    assert (
        abs(auc - 0.5) < 4.5 / np.sqrt(12 * pairs) * 3
    )  # a permutation's places depend on each other: with room
    monkeypatch.setattr("fedspeed.routing.anonymous.mix_node.secret_order", lambda n: list(range(n)))
    assert timing_auc(views(8, 4)) == 1.0


def test_what_is_followed_is_right_and_own_cells_are_no_riddle():
    for view in views(
        5, 6, coalition=Coalition(frozenset({0, 1}), relays=frozenset(range(5)), clients=frozenset({0, 1}))
    ):
        assert view.cells
        for chunk, sources in view.traced.items():
            np.testing.assert_array_equal(sources, view.truth[chunk])
            assert set(sources) == {2, 3, 4} and len(view.cells[chunk]) == 3
