"""FATE-LLM: whole runs on real engines under ZeRO-2 with the optimizer on the CPU, one epoch a round, summed
by pairwise masks over gloo, against the same runs summed in the clear.
"""

import pytest

from fedspeed.routing.exchange import PlainExchange
from fedspeed.routing.pairwise.exchange import PairwiseExchange
from fedspeed.routing.transports.local import LocalTransport
from fedspeed.session.participant import make_plain_exchange
from tests.federation import runs
from tests.federation.runs import largest, run_worlds, same_bits, settings

CARRIES = {0: (0, 2), 1: (1,)}
ROUNDS = 2
CASES = {
    "plain": {"name": "lora_average"},
    "native": {"name": "fate_llm"},
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


def test_a_masked_run_learns_what_a_plain_one_learns(played):
    """Up to the resolution of the sums, on all ranks with the same bits, with optimizers that are kept."""
    expected = played[0]["plain"][0]
    states = played[0]["native"][0]
    assert len(states) == ROUNDS + 1 and same_bits(states[0], expected[0])
    for one, other in zip(states, played[1]["native"][0], strict=True):
        assert same_bits(one, other)
    assert largest(states[-1], states[0]) > 1e-3
    assert largest(states[1], expected[1]) < 4e-8, "1e-8, and the rounding of sums and weights to fp32"
    assert largest(states[-1], expected[-1]) < 1e-5


def test_a_parameter_takes_the_bytes_of_the_table(played):
    """16 up and 8 down, over gloo, and nothing but parameters is sent: `lora_average` adds a sketch."""
    parameters = sum(array.size for array in played[0]["native"][0][0].values())
    assert {n for n, _ in played[0]["plain"][1]} != {parameters}
    for rank, each in ((0, 8), (1, 16)):
        heads = [64, 32]  # the first sum begins with the public keys
        assert played[rank]["native"][1] == [(parameters, each * parameters + 8 + head) for head in heads]


@pytest.mark.parametrize("secure_sum", ["native", "compact", "none"])
def test_the_session_sums_as_the_method_says(secure_sum):
    config = configuration("m", {"name": "fate_llm", "secure_sum": secure_sum})
    exchange = make_plain_exchange(config, LocalTransport.set_of(1)[0], None)
    if secure_sum == "none":
        assert type(exchange) is PlainExchange
    else:
        assert isinstance(exchange, PairwiseExchange) and exchange._encoding.name == secure_sum


def test_ranks_that_share_a_base_take_epochs_of_different_lengths(played):
    """One rank takes 6 + 4 steps a round, and the other 3: it makes idle passes until the first has finished.
    The result is that of ranks that share nothing.
    """
    states, _, records = played[0]["base shared by ranks"]
    assert largest(states[-1], played[0]["plain"][0][-1]) < 1e-5
    for record in (*records[1:], *played[0]["native"][2][1:]):
        assert [client.local_steps for client in record.per_client] == [6, 3, 4]
