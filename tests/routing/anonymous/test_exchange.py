"""The anonymous exchange over transports, as the rounds use it."""

import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedspeed.errors import FedSpeedError, LostPeerError
from fedspeed.routing.anonymous.exchange import AnonymousExchange, exchange_public_keys
from fedspeed.routing.config import RoutingConfig
from fedspeed.routing.transports.local import LocalTransport
from tests.conftest import ROOT
from tests.limits import LIMIT_S
from tests.processes import free_port, run_ranks
from tests.routing.contract import gloo_rank, in_threads
from tests.routing.sites import Sites

CONFIG = RoutingConfig("mix+mask", cell_kib=4, step_deadline_s=LIMIT_S, deadline_s=LIMIT_S)


def exchange_of(transport, config=CONFIG, settings=b"run", names=()):
    identity = Ed25519PrivateKey.generate()
    roster = exchange_public_keys(transport, LIMIT_S, identity)
    return AnonymousExchange(transport, config, identity, roster, settings, names=names)


def rounds(transport, config=CONFIG):
    """Sum three updates with unequal weights, and exact values after each.

    Returns:
        (beginning of the last sum in hex, largest error of each sum divided by the weight).
    """
    exchange = exchange_of(transport, config)
    n = transport.size
    errors = []
    for number in range(3):
        updates = [
            np.random.default_rng([number, r]).normal(size=3001).astype(np.float32) * 1e-3 for r in range(n)
        ]
        weights = [float(10 * r + number) for r in range(n)]
        handle = exchange.start(
            updates[transport.rank] * np.float32(weights[transport.rank]), weights[transport.rank]
        )
        total, weight = handle.wait(LIMIT_S)
        exact = sum(w * u.astype(np.float64) for w, u in zip(weights, updates))
        assert weight == sum(weights) and total.dtype == np.float32 and handle.clipped == 0
        errors.append(float(np.abs(total - exact).max() / weight))
        exact_sums, _ = exchange.start(np.array([1.5, transport.rank, -(2.0**-40)]), 0.0).wait(LIMIT_S)
        np.testing.assert_array_equal(exact_sums, [1.5 * n, n * (n - 1) / 2, -n * 2.0**-40])
    return total.tobytes().hex()[:64], errors


@pytest.mark.parametrize("mode", ["mix", "mask", "mix+mask"])
@pytest.mark.parametrize("size", [3, 5])
def test_updates_are_summed_within_the_quantisation(size, mode):
    results = in_threads(LocalTransport.set_of(size), lambda t: rounds(t, replace(CONFIG, mode=mode)))
    assert len({total for total, _ in results}) == 1
    assert max(results[0][1]) < 1e-9, "the bounds follow the updates from the first round on"


def test_over_gloo():
    results = run_ranks(3, gloo_rank, 3, free_port(), rounds, timeout=LIMIT_S)
    assert len({total for total, _ in results}) == 1


def test_over_mpi():
    program = (
        "import json; from tests.routing.anonymous.test_exchange import rounds; from "
        "fedspeed.routing.transports.mpi import MpiTransport;"
        "t = MpiTransport([0, 1, 2]); r = rounds(t); t.close(); print('RESULT', json.dumps(r[0]))"
    )
    done = subprocess.run(
        ["mpirun", "--oversubscribe", "-n", "3", sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert len(results) == 3 and len(set(results)) == 1


def test_over_tls(tmp_path):
    transports = Sites(tmp_path, 3).all()
    assert len({total for total, _ in in_threads(transports, rounds)}) == 1
    for transport in transports:
        transport.close()


@pytest.mark.parametrize("size", [9, pytest.param(16, marks=pytest.mark.slow)])
def test_many_participants(size):
    assert len({total for total, _ in in_threads(LocalTransport.set_of(size), rounds)}) == 1


def test_fewer_participants_than_a_sum_needs_are_refused():
    with pytest.raises(FedSpeedError, match="2 participants: a sum of fewer than 3.*routing.mode=plain"):
        AnonymousExchange(LocalTransport.set_of(2)[0], CONFIG, Ed25519PrivateKey.generate(), [b"", b""], b"")


@pytest.mark.parametrize("names", [(), ("north", "east", "south", "west", "middle")])
def test_the_others_go_on_without_a_participant_that_leaves(capfd, names):
    """Sites have names, which are printed; the participants of a job have numbers."""

    def act(transport):
        exchange = exchange_of(transport, names=names)
        totals = []
        for number in range(3):
            if transport.rank == 2 and number == 1:
                exchange.close()
                return None
            totals.append(
                exchange.start(np.full(500, (transport.rank + 1) / 10, np.float32), 1.0).wait(LIMIT_S)
            )
        return [(total[0], weight) for total, weight in totals]

    results = [r for r in in_threads(LocalTransport.set_of(5), act) if r]
    for totals in results:
        (a, wa), (b, wb), (c, wc) = totals
        assert (wa, wb, wc) == (5, 4, 4)
        assert [a, b, c] == pytest.approx([1.5, 1.2, 1.2], rel=1e-5)
    lost = f"members were lost before the sum was committed (lost: {names[2] if names else 2})"
    assert f"exchange 1: {lost}; once more" in capfd.readouterr().err


def test_below_the_threshold_it_stops_with_a_message():
    def act(transport):
        exchange = exchange_of(transport)
        if transport.rank > 1:
            exchange.close()
            return "left"
        with pytest.raises(LostPeerError, match="only 2 of 4 members are left, 3 are needed"):
            exchange.start(np.zeros(10, np.float32), 1.0).wait(LIMIT_S)

    in_threads(LocalTransport.set_of(4), act)


def test_a_participant_that_sends_nothing_ends_the_run_at_the_deadline():
    """It may be alive, so that the others do not go on without it."""
    others_done = threading.Barrier(4)

    def act(transport):
        identity = Ed25519PrivateKey.generate()
        roster = exchange_public_keys(transport, LIMIT_S, identity)
        exchange = AnonymousExchange(transport, replace(CONFIG, deadline_s=3.0), identity, roster, b"run")
        if transport.rank != 3:
            with pytest.raises(LostPeerError, match="3 .*are connected, but did not send what was due"):
                exchange.start(np.full(10, 1.0, np.float32), 1.0).wait(LIMIT_S)
        others_done.wait(LIMIT_S)

    in_threads(LocalTransport.set_of(4), act)


def test_updates_are_summed_once_however_the_weights_grow():
    """A second sum of the same updates, over one member less, would reveal that member's update."""

    def act(transport):
        exchange = exchange_of(transport)
        sums = []
        summed = exchange._attempts.agree
        exchange._attempts.agree = lambda summand: sums.append(summand.length) or summed(summand)
        totals = [
            exchange.start(np.full(600, weight, np.float32), weight).wait(LIMIT_S)
            for weight in (1.0, 1000.0, 3.0)
        ]
        return [(float(total[0]), weight) for total, weight in totals], [length > 600 for length in sums]

    for totals, sums in in_threads(LocalTransport.set_of(3), act):
        assert [weight for _, weight in totals] == [3, 3000, 9] and sums == [False, True] * 3
        assert totals[-1][0] == pytest.approx(9, rel=1e-3)


def test_a_value_that_is_not_finite_spoils_only_its_own_sum():
    def act(transport):
        exchange = exchange_of(transport)
        values = np.array([
            1.0,
            np.nan if transport.rank == 1 else 1.0,
            np.inf if transport.rank == 2 else 2.0,
            1e300 if transport.rank == 0 else 1.0,
            5.0,
        ])
        exact, weight = exchange.start(values, 1.0).wait(LIMIT_S)
        vector = np.full(300, 0.1, np.float32)
        vector[7] = np.nan if transport.rank == 1 else 0.1
        vector[8] = 5.0
        handle = exchange.start(vector, 1.0)
        total, _ = handle.wait(LIMIT_S)
        return exact, weight, total, handle.clipped

    for exact, weight, total, clipped in in_threads(LocalTransport.set_of(3), act):
        np.testing.assert_array_equal(exact, [3.0, np.nan, np.nan, np.nan, 15.0])
        assert weight == 3.0 and clipped == 1
        np.testing.assert_allclose(total[[6, 7, 8]], [0.3, 0.2, 15.0], rtol=1e-5)


def test_an_invalid_weight_is_refused_by_all():
    def act(transport):
        exchange = exchange_of(transport)
        with pytest.raises(FedSpeedError, match="somebody sends an invalid weight"):
            exchange.start(np.zeros(10, np.float32), -5.0 if transport.rank == 1 else 1.0).wait(LIMIT_S)

    in_threads(LocalTransport.set_of(3), act)


def test_other_settings_are_refused():
    def act(transport):
        exchange = exchange_of(transport, settings=b"other" if transport.rank == 1 else b"run")
        with pytest.raises(
            FedSpeedError, match="announced itself with other settings|convicted this participant"
        ):
            exchange.start(np.zeros(10, np.float32), 1.0).wait(LIMIT_S)

    in_threads(LocalTransport.set_of(3), act)


def test_threads_end_with_the_exchange():
    before = threading.active_count()
    in_threads(LocalTransport.set_of(3), lambda t: exchange_of(t).close())
    end = time.monotonic() + LIMIT_S
    while threading.active_count() > before + 1:
        assert time.monotonic() < end, "threads outlived their exchange"
        time.sleep(0.01)


def test_every_tensor_of_any_update_keeps_its_precision():
    """The scale of an update is not known beforehand: neither in the first round, nor where other tensors
    train than in the last one.
    """

    def act(transport):
        exchange = exchange_of(transport, replace(CONFIG, mode="mask", cell_kib=64))
        found = []
        for scales in ((1e4, 1e-7), (1e-7, 1e4)):
            lengths = (1000, 700)
            vectors = [
                np.random.default_rng([r]).normal(size=1700) * np.repeat(scales, lengths) for r in range(3)
            ]
            handle = exchange.start(vectors[transport.rank].astype(np.float32), 1.0, lengths)
            total, _ = handle.wait(LIMIT_S)
            exact = sum(v.astype(np.float32).astype(np.float64) for v in vectors)
            found += [
                handle.clipped,
                np.abs(total - exact)[:1000].max() / scales[0],
                np.abs(total - exact)[1000:].max() / scales[1],
            ]
        return found

    for first, a, b, second, c, d in in_threads(LocalTransport.set_of(3), act):
        assert (first, second) == (0, 0) and max(a, b, c, d) < 1e-5


class Liar(AnonymousExchange):
    """Sends other norm bounds than its update has."""

    factor = 0.0

    def _sum_exactly(self, request, values):
        return super()._sum_exactly(request, self.factor * values)


@pytest.mark.parametrize("factor", [0.0, -1.5, 1e-3, -1e9, np.nan, 1e12])
def test_a_false_norm_bound_ends_alike_for_all(factor):
    """Either all have the same sum and know that values were clipped, or all end with the same error."""

    def act(transport):
        exchange = exchange_of(transport, replace(CONFIG, mode="mask"))
        if transport.rank == 1:
            exchange.__class__ = Liar
            exchange.factor = factor
        handle = exchange.start(np.full(10, [1.0, 100.0, 1.0][transport.rank], np.float32), 1.0)
        try:
            total, weight = handle.wait(LIMIT_S)
        except FedSpeedError as error:
            return str(error)
        return total.tobytes(), weight, handle.clipped

    results = in_threads(LocalTransport.set_of(3), act)
    assert len(set(results)) == 1
    if factor < -1 or np.isnan(factor):
        assert "somebody sends an invalid bound" in results[0]
    else:
        assert results[0][1] == 3.0 and (results[0][2] == 10) == (abs(factor) < 1)


def test_the_error_for_an_update_beyond_the_range_names_a_remedy():
    def act(transport):
        exchange = exchange_of(transport)
        with pytest.raises(FedSpeedError, match="an update is beyond 4.61e.18.*lower train.lr"):
            exchange.start(np.full(10, 1e30 if transport.rank == 1 else 1.0, np.float32), 1.0).wait(LIMIT_S)

    in_threads(LocalTransport.set_of(3), act)


def test_the_tensor_lengths_must_sum_to_that_of_the_vector():
    exchange = exchange_of(LocalTransport.set_of(1)[0], replace(CONFIG, min_participants=1))
    with pytest.raises(ValueError, match="tensors of 9 values together, in a vector of 10"):
        exchange.start(np.zeros(10, np.float32), 1.0, (4, 5))
    exchange.close()


@pytest.mark.parametrize("size", [3, 5])
def test_bounds_that_rode_in_an_exact_sum_before_give_the_same_sum_in_one_exchange(size):
    """The rounds sum an update's bounds together with their counters, in the header."""

    def act(transport):
        exchange = exchange_of(transport, replace(CONFIG, mode="mask"))
        lengths = (1000, 700)
        vector = np.random.default_rng([transport.rank]).normal(size=1700).astype(np.float32)
        own = exchange.bounds_of(vector, lengths)
        assert own.dtype == np.float64 and len(own) == 2 and (own > 0).all()
        bounds, _ = exchange.start(own, 0.0, label="header of round 1").wait(LIMIT_S)
        attempts = exchange._attempts._made
        handle = exchange.start(vector, 1.0, lengths, bounds=bounds, label="update of round 1")
        total, weight = handle.wait(LIMIT_S)
        assert exchange._attempts._made == attempts + 1, "nothing else is summed"
        assert (weight, handle.participants, handle.clipped, handle.skipped) == (size, size, 0, False)
        return total

    expected = sum(
        np.random.default_rng([r]).normal(size=1700).astype(np.float32).astype(float) for r in range(size)
    )
    for total in in_threads(LocalTransport.set_of(size), act):
        np.testing.assert_allclose(total, expected, atol=2e-6)
