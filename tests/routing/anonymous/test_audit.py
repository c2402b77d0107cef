"""The adversary of the audit: it succeeds where a mode leaks something, and only there."""

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


def views(n: int, rounds: int, length: int = 96, coalition=None, **parameters):
    """Return a coalition's views of several rounds, in which a member's updates resemble each other, as they
    do where each member has data of one kind. By default all owners collude.
    """
    random = np.random.default_rng(n)
    mean = random.normal(size=(n, length))
    parties = Parties(n, length, chunk_length=length // n, **parameters)
    seen = []
    for number in range(rounds):
        for i in range(n):
            update = (mean[i] + 0.7 * random.normal(size=length)).astype(np.float32)
            parties.integers[i] = np.empty(length, np.uint32)
            ring.encode(update, 64.0 * n, noise(number), parties.integers[i])
        seen.append(observe(parties.attempt(number), coalition or Coalition(frozenset(range(n)))))
    return seen


@pytest.mark.parametrize("n", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_without_masks_linkers_succeed(n):
    linkages = link(views(n, 40, length=240, masked=False))
    assert linkages["cosine"].accuracy > 0.8 and linkages["greedy"].accuracy > 0.7
    assert max(linkage.upper(len(LINKERS)) for linkage in linkages.values()) > 0.6


@pytest.mark.parametrize("n,rounds", [(3, 250), pytest.param(8, 60, marks=pytest.mark.slow)])
def test_with_masks_all_linkers_guess(n, rounds):
    """The advantage is within 4.5 standard errors of zero; benchmarks/linkage.py measures it closely."""
    for name, linkage in link(views(n, rounds)).items():
        standard_error = linkage.upper(1, 0.8413) - linkage.advantage
        assert abs(linkage.advantage) < 4.5 * standard_error, name


@pytest.mark.parametrize("corrupt", [0, 1, 3])
def test_the_masks_of_colluders_name_nobody_else(corrupt, monkeypatch):
    colluding = frozenset(range(corrupt))
    coalition = Coalition(frozenset(range(5)), clients=colluding)
    seen = views(5, 25, coalition=coalition)
    share, chance = named_share(seen)
    pairs = sum(len(named) for view in seen for named in view.named.values())
    assert chance == 1 / (5 - corrupt) and abs(share - chance) < 4.5 / np.sqrt(pairs)
    # They do where honest members have no masks with each other.
    apply = Masks.apply
    monkeypatch.setattr(Masks, "apply", lambda self, *where: apply(self.known_to(colluding), *where))
    members = Parties(5, 96, chunk_length=20).attempt()
    for member in members:
        monkeypatch.setattr(member, "_open", lambda member=member: end_with_zeros(member))
    assert named_share([observe(members, coalition)])[0] == 1.0


def end_with_zeros(member):
    """End an attempt before its masks, which do not cancel, are removed; owners have seen all cells."""
    return AgreedSum(np.zeros(member.parameters.length, np.uint32), member.parameters.members)
    yield  # never reached: it makes this a generator, as a phase is


def test_linkers_match_vectors_that_are_almost_equal():
    random = np.random.default_rng(0)
    a = random.normal(size=(6, 300))
    order = random.permutation(6)
    b = (a + 0.05 * random.normal(size=a.shape))[order]
    for name, linker in LINKERS.items():
        accuracy = (order[linker(a, b, random)] == np.arange(6)).mean()
        assert accuracy > (0.5 if name == "norms of layers" else 0.99), name


def test_chance_is_no_advantage():
    random = np.random.default_rng(0)
    linkage = Linkage()
    for _ in range(4000):
        linkage.add(int((random.permutation(5) == np.arange(5)).sum()), 5)
    assert abs(linkage.advantage) < 0.02 and linkage.upper(1, 0.5) == pytest.approx(linkage.advantage)
    assert linkage.upper(6) > linkage.upper(1)


@pytest.mark.parametrize(
    "corrupt", [0, pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)]
)
def test_cells_are_traced_as_often_as_the_formula_says(corrupt):
    coalition = Coalition(frozenset(range(8)), relays=frozenset(range(corrupt)))
    share = traced_share(views(8, 25, coalition=coalition))
    assert abs(share - compromised(8, corrupt, 2)) < 0.12


def test_the_order_of_arrival_reveals_nothing_unless_a_relay_preserves_it(monkeypatch):
    assert timing_auc(views(8, 4, relays=0)) == 1.0
    auc = timing_auc(views(8, 40))
    pairs = 40 * 8 * 8
    # The places in a permutation depend on each other, so three times the error of independent ones.
    assert abs(auc - 0.5) < 3 * 4.5 / np.sqrt(12 * pairs)
    monkeypatch.setattr("fedspeed.routing.anonymous.mix_node.secret_order", lambda n: list(range(n)))
    assert timing_auc(views(8, 4)) == 1.0


def test_traces_are_right_and_the_colluders_own_cells_do_not_count():
    coalition = Coalition(frozenset({0, 1}), relays=frozenset(range(5)), clients=frozenset({0, 1}))
    for view in views(5, 6, coalition=coalition):
        assert view.cells
        for chunk, sources in view.traced.items():
            np.testing.assert_array_equal(sources, view.truth[chunk])
            assert set(sources) == {2, 3, 4} and len(view.cells[chunk]) == 3
