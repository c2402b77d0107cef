"""FATE-LLM: whole runs on real engines under ZeRO-2 with the optimizer on the CPU, one epoch a round, summed
by pairwise masks over gloo, against the same runs summed in the clear.
"""

import numpy as np
import pytest

from tests.federation import runs
from tests.federation.runs import largest, run_worlds, same_bits, settings

CARRIES = {0: (0, 2), 1: (1,)}
ROUNDS = 2
CASES = {
    "plain": {"name": "lora_average"},
    "native": {"name": "fate_llm"},
    "compact": {"name": "fate_llm", "secure_sum": "compact"},
    "base shared by ranks": {"name": "lora_average"},
}


def configuration(base, method):
    return settings(
        base,
        train={"optimizer": "adamw", "momentum": 0.0, "lr": 5e-4},
        federation={"rounds": ROUNDS, "method": method, "local_optimizer": "keep", "round_budget": "epoch"},
        routing={"mode": "plain"},
    )


class Counted:
    """An exchange that notes the bytes of each update at the socket."""

    def __init__(self, exchange):
        self._exchange = exchange
        self.of_updates = []

    def __getattr__(self, name):
        return getattr(self._exchange, name)

    def start(self, vector, weight, parts=None, **options):
        handle = self._exchange.start(vector, weight, parts, **options)
        if not options.get("label", "").startswith("update"):
            return handle
        before = self._exchange.bytes_sent
        wait = handle.wait

        def counted(deadline_s):
            result = wait(deadline_s)
            self.of_updates.append((vector.size, self._exchange.bytes_sent - before))
            return result

        handle.wait = counted
        return handle


def all_cases(world, base, folder):
    """By case: states after each round, (values, bytes sent) of each update, and records."""
    out = {}
    for name, method in CASES.items():
        watched = []

        def watch(exchange, watched=watched):
            watched.append(Counted(exchange))
            return watched[0]

        kind = "zero3" if name == "base shared by ranks" else "zero2-cpu"
        found = runs.course(world, name, configuration(base, method), CARRIES, folder, kind=kind, watch=watch)
        out[name] = (found.states, watched[0].of_updates, found.records)
    return out


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    base = runs.tiny_llama(tmp_path_factory.mktemp("base") / "llama")
    return run_worlds((2,), all_cases, base, str(tmp_path_factory.mktemp("runs")))


@pytest.mark.parametrize("name", ["native", "compact"])
def test_a_masked_run_learns_what_a_plain_one_learns(played, name):
    """Up to the resolution of the sums, on all ranks with the same bits, with optimizers that are kept."""
    expected = played[0]["plain"][0]
    states = played[0][name][0]
    assert len(states) == ROUNDS + 1 and same_bits(states[0], expected[0])
    for one, other in zip(states, played[1][name][0], strict=True):
        assert same_bits(one, other)
    assert largest(states[-1], states[0]) > 1e-3
    assert largest(states[1], expected[1]) <= (2e-8 if name == "native" else 2.0**-26) + 2e-8
    assert largest(states[-1], expected[-1]) < 1e-5


@pytest.mark.parametrize(("name", "up", "down"), [("native", 16, 8), ("compact", 4, 4)])
def test_a_parameter_takes_the_bytes_of_the_table(played, name, up, down):
    """And nothing but parameters is sent: `lora_average` adds a sketch."""
    parameters = sum(array.size for array in played[0][name][0][0].values())
    assert {n for n, _ in played[0]["plain"][1]} != {parameters}
    for rank, each in ((0, down), (1, up)):
        heads = [64, 32]  # the first sum begins with the public keys
        assert played[rank][name][1] == [(parameters, each * parameters + 8 + head) for head in heads]


def test_a_sum_loses_no_more_than_its_resolution(played):
    """Both masked runs differ from the plain one: it is another sum, and its result is used."""
    expected = played[0]["plain"][0][1]
    compact = played[0]["compact"][0][1]
    assert any((compact[n] != expected[n]).any() for n in expected)
    assert all(np.isfinite(array).all() for array in compact.values())


def test_ranks_that_share_a_base_take_epochs_of_different_lengths(played):
    """One rank takes 6 + 4 steps a round, and the other 3: it makes idle passes until the first has finished.
    The result is that of ranks that share nothing.
    """
    states, _, records = played[0]["base shared by ranks"]
    assert largest(states[-1], played[0]["plain"][0][-1]) < 1e-5
    for record in (*records[1:], *played[0]["native"][2][1:]):
        assert [client.local_steps for client in record.per_client] == [6, 3, 4]
