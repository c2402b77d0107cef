"""The lying coalition of the audit: it gets nothing by its lies, and the audit would show it if it did."""

import numpy as np
import pytest

from fedspeed.routing.anonymous import ring
from fedspeed.routing.anonymous.bounds import norm_bound
from fedspeed.routing.anonymous.unmasking import OpeningMember
from fedspeed.routing.audit import attacks, liars
from fedspeed.routing.audit.attacks import DIFFERENT, ENDED, OWN_PART, RIGHT, SKIPPED, WRONG
from fedspeed.routing.config import RoutingConfig
from tests.routing.anonymous.test_crypto import noise

UPDATES = [np.random.default_rng(i).normal(size=400).astype(np.float32) for i in range(7)]


def play(*names: str, n: int = 5, f: int = 2, config=RoutingConfig("mix+mask")):
    """Play attacks of these names, or all that apply, by the first f of n participants; return the results by
    name.
    """
    updates = UPDATES[:n]
    span = sum(map(norm_bound, updates))
    integers = [np.empty(400, np.uint32) for _ in updates]
    for i, update in enumerate(updates):
        ring.encode(update, span, noise(i), integers[i])
    chosen = [a for a in attacks.attacks_on(config, n - f) if not names or a.name in names]
    assert len(chosen) >= len(names)
    coalition = frozenset(range(f))
    return {
        result.attack: result for result in attacks.play_attacks(config, updates, integers, coalition, chosen)
    }


@pytest.mark.parametrize(
    "n,f,mode",
    [
        (3, 1, "mix+mask"),
        (4, 1, "mix+mask"),
        (4, 2, "mix+mask"),
        (5, 3, "mix+mask"),
        pytest.param(7, 3, "mix+mask", marks=pytest.mark.slow),
        (4, 2, "mask"),
        (4, 2, "mix"),
    ],
)
def test_lies_get_nothing(n, f, mode):
    results = play(n=n, f=f, config=RoutingConfig(mode))
    assert len(results) > 10
    for name, result in results.items():
        assert not result.succeeded or result.limit, result
        assert all(len(group) > 1 or group[0] < f for group in result.named), result
        assert result.end in (RIGHT, OWN_PART, SKIPPED, ENDED), result
        if mode != "mix" and not result.limit:
            assert result.closest.error > 0.5, result
    # Owners see every cell without masks, and need no lie.
    assert (results["looks on"].closest.error < 1e-5) == (mode == "mix")


@pytest.mark.parametrize("relays,cipher", [(1, "aes-128-gcm"), (7, "chacha20-poly1305")])
def test_the_exchange_is_the_configured_one(relays, cipher):
    config = RoutingConfig("mix+mask", relays=relays, cipher=cipher, cell_kib=1)
    assert not any(r.succeeded and not r.limit for r in play(n=5, f=3, config=config).values())


def test_who_is_named():
    results = play(n=5, f=2)
    for name in ("two onion keys", "two mask keys", "two contributions", "two marks", "a two-faced list"):
        assert results[name].named == ((0,),) and results[name].end == RIGHT, results[name]
    assert results["two-faced sums"].named == ((0, 2),)
    assert results["a partly withheld secret"].named == ((0, 2),)
    assert results["leaving"].silent == (0,)


def test_without_comparing_announcements_two_marks_open_one_update(monkeypatch):
    monkeypatch.setattr("fedspeed.routing.anonymous.commitment.echo", lambda announced: bytes(32))
    result = play("two marks")["two marks"]
    assert result.succeeded and result.closest.error < 1e-5 and result.closest.share == 1.0


def test_without_settled_marks_two_sums_differ_by_one_update(monkeypatch):
    """So they do after everybody has lost its marks, which the audit shows as a known limit."""
    repeated = ("retried after a loss", "repeated with fewer", "repeated, one mark lost")
    assert all(result.end == SKIPPED for result in play(*repeated).values())
    monkeypatch.setattr("fedspeed.routing.anonymous.commitment.reasons_to_skip", lambda *_: frozenset())
    results = play(*repeated)
    for result in results.values():
        assert result.succeeded and result.closest.error < 1e-5 and result.end == RIGHT, result
    monkeypatch.undo()
    lost = play("repeated, all marks lost")["repeated, all marks lost"]
    assert lost.succeeded and lost.closest.error < 1e-5 and "run.seed" in lost.limit


def test_without_checking_sums_false_ones_pass(monkeypatch):
    assert play("false sums")["false sums"].end == RIGHT
    monkeypatch.setattr(OpeningMember, "_check_sums", liars.Colluder._check_sums)
    assert play("false sums")["false sums"].end == WRONG
    assert play("two-faced sums")["two-faced sums"].end == RIGHT  # the comparison of totals finds it
    monkeypatch.setattr(OpeningMember, "_compare_totals", nothing)
    result = play("two-faced sums")["two-faced sums"]
    assert result.end == DIFFERENT and result.succeeded


def nothing(member, total):
    """Compare no totals."""
    return
    yield  # never reached: it makes this a generator, as a phase is


def test_a_slandered_honest_member_counts_as_a_success(monkeypatch):
    """Where two signatures convict nobody, another onion key makes its victim look guilty."""
    monkeypatch.setattr("fedspeed.routing.anonymous.commitment.echo", lambda announced: bytes(32))
    monkeypatch.setattr("fedspeed.routing.anonymous.statements.Statements.merge", lambda *_: None)
    assert any(play("two onion keys", n=n, f=1)["two onion keys"].succeeded for n in (4, 5, 7))


def test_an_owner_with_all_relays_chooses_its_own_part():
    assert play("false sums", n=7, f=5)["false sums"].end in (RIGHT, OWN_PART)
    config = RoutingConfig("mask")
    assert {play("false sums", n=3, f=1, config=config)["false sums"].end} == {RIGHT}
    assert {play("false sums", n=5, f=3, config=config)["false sums"].end} == {OWN_PART}
