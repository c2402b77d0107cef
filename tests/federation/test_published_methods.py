"""Whole runs of `fedprox`, `scaffold` and `fedsa` against plain torch: three clients of unequal weights, of
which two take part in a round.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from fedspeed.federation.layout import Layout
from fedspeed.federation.methods.config import variant_of
from fedspeed.federation.methods.turns import Trained
from fedspeed.federation.schedule import lr_at, sample_clients
from fedspeed.models.factors import is_factor_b
from tests.federation.runs import begin, federation, largest, run_worlds, settings, share_of, tiny_llama
from tests.processes import Scenarios
from tests.tiny import run_config

CLIENTS = (0, 1, 2)
ROUNDS = 3
SEED = 3  # in whose rounds each client is asked at least once, and some twice
STEPS = 3
MU = 2.0
SECTIONS = {
    "fedprox": {"train": {"momentum": 0.5}, "method": {"name": "fedprox", "mu": MU}},
    "scaffold": {
        "train": {"momentum": 0.0, "weight_decay": 0.1, "schedule": "linear", "warmup_steps": 2},
        "method": {"name": "scaffold"},
    },
    "fedsa": {"train": {"momentum": 0.5}, "method": {"name": "fedsa"}},
}


def configured(base, name):
    own = SECTIONS[name]
    return settings(
        base,
        run={"seed": SEED},
        train={"lr": 0.2, "local_steps": STEPS, **own["train"]},
        federation={"rounds": ROUNDS, "clients_per_round": 2, "method": own["method"]},
    )


class ByHand:
    """A run in plain torch. What a method adds is in `correction`, `kept` and `averaged`."""

    def __init__(self, config, start):
        from tests.federation.plain import Plain

        self.config = config
        self.plain = Plain(config)
        self.state = {n: t.astype(np.float64) for n, t in start.items()}
        self.memory = {}

    def start_of(self, client):
        """Return the weights that a client begins with."""
        return self.state

    def correction(self, client, name, now, begin):
        """Return what is added to a gradient."""
        return 0.0

    def finish(self, client, begin, end, rates):
        """Note what a client keeps."""

    def averaged(self, name):
        """Say whether the mean of an array is taken."""
        return True

    def run(self):
        config = self.config
        for number in range(1, config.federation.rounds + 1):
            asked = sample_clients(config.run.seed, number, len(CLIENTS), config.federation.clients_per_round)
            weight = sum(map(share_of, asked))
            deltas = {name: 0.0 for name in self.state}
            self.begin_round(asked, weight)
            for client in asked:
                begin = dict(self.start_of(client))
                end = self.local_steps(client, begin, (number - 1) * STEPS)
                for name in filter(self.averaged, deltas):
                    deltas[name] = deltas[name] + share_of(client) / weight * (end[name] - begin[name])
            self.state = {name: array + deltas[name] for name, array in self.state.items()}
            self.end_round()
        return self

    def begin_round(self, asked, weight):
        pass

    def end_round(self):
        pass

    def local_steps(self, client, begin, first):
        train = self.config.train
        now = begin
        velocity = dict.fromkeys(begin, 0.0)
        rates = []
        for step in range(first, first + STEPS):
            self.plain.load({name: array.astype(np.float32) for name, array in now.items()})
            rates.append(lr_at(train, step, ROUNDS * STEPS))
            for name, grad in self.plain.gradient(client, step).items():
                whole = (
                    grad.numpy() + self.correction(client, name, now, begin) + train.weight_decay * now[name]
                )
                velocity[name] = train.momentum * velocity[name] + whole
            now = {name: array - rates[-1] * velocity[name] for name, array in now.items()}
        self.finish(client, begin, now, rates)
        return now


class Prox(ByHand):
    def correction(self, client, name, now, begin):
        return MU * (now[name] - begin[name])


class Variates(ByHand):
    def __init__(self, config, start):
        super().__init__(config, start)
        self.common = {name: np.zeros_like(array) for name, array in start.items()}

    def begin_round(self, asked, weight):
        self.changes = dict.fromkeys(self.state, 0.0)
        self.part = len(asked) / len(CLIENTS) / weight

    def own(self, client, name):
        return self.memory.get(client, {}).get(name, 0.0)

    def correction(self, client, name, now, begin):
        return self.common[name] - self.own(client, name)

    def finish(self, client, begin, end, rates):
        new = {
            name: self.own(client, name) - self.common[name] + (begin[name] - end[name]) / sum(rates)
            for name in begin
        }
        for name, array in new.items():
            change = share_of(client) * self.part * (array - self.own(client, name))
            self.changes[name] = self.changes[name] + change
        self.memory[client] = new

    def end_round(self):
        self.common = {name: array + self.changes[name] for name, array in self.common.items()}


class SharedA(ByHand):
    def start_of(self, client):
        return self.state | self.memory.get(client, {})

    def finish(self, client, begin, end, rates):
        self.memory[client] = {name: array for name, array in end.items() if is_factor_b(name)}

    def averaged(self, name):
        return not is_factor_b(name)


BY_HAND = {"fedprox": Prox, "scaffold": Variates, "fedsa": SharedA}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    base = tiny_llama(tmp_path_factory.mktemp("base") / "llama")
    return run_worlds((1,), all_runs, base, str(tmp_path_factory.mktemp("published")))[0]


def all_runs(world, base, folder):
    out = Scenarios()
    for name in SECTIONS:
        out.play(name, run_and_by_hand, world, configured(base, name), name, folder=folder)
    return out


def run_and_by_hand(world, config, name, folder):
    with federation(world, name, config, {0: CLIENTS}, folder) as fed:
        first = begin(fed)
        start = {n: t for n, t in first.state.items() if ":" not in n}
        end = fed.run(first)
    expected = BY_HAND[name](config, start).run()
    without = ByHand(config, start).run()
    return SimpleNamespace(
        state=end.state,
        memory=end.memory,
        expected=expected.state,
        kept=expected.memory,
        common=getattr(expected, "common", {}),
        without=without.state,
    )


@pytest.mark.parametrize("name", SECTIONS)
def test_a_run_learns_what_plain_torch_does(seen, name):
    found = seen[name]
    trained = {n: t for n, t in found.state.items() if ":" not in n}
    off = largest(trained, found.expected)
    assert off < 5e-6 and largest(found.without, found.expected) > 1000 * off, "the method changes something"


def test_control_variates_are_those_of_plain_torch(seen):
    """Of a client and the common one, where a client's weight and the share of sampled ones count."""
    found = seen["scaffold"]
    common = {n.removeprefix("control:"): t for n, t in found.state.items() if ":" in n}
    assert max(float(np.abs(t).max()) for t in common.values()) > 1e-2
    assert largest(common, found.common) < 1e-4
    assert found.memory.keys() == found.kept.keys() == set(CLIENTS)
    assert max(largest(found.memory[c], found.kept[c]) for c in CLIENTS) < 1e-4


def test_each_client_keeps_its_own_b(seen):
    found = seen["fedsa"]
    assert found.memory.keys() == found.kept.keys() == set(CLIENTS)
    assert max(largest(found.memory[c], found.kept[c]) for c in CLIENTS) < 5e-6
    assert largest(found.memory[0], found.memory[1]) > 1e-2


# What one turn of SCAFFOLD comes to.

WEIGHTS = {"w": np.full((2, 2), 3.0, np.float32)}


class Skipping:
    """A trainer whose optimizer skips a step: only those it has taken have moved the weights."""

    def __init__(self, sums):
        self.sums = sums

    def local_steps(self, engine, turns, *, between):
        moved = {"w": turns[0].start["w"] - np.float32(self.sums.lr_sum)}
        return [Trained(end=moved, sums=self.sums, memory=turns[0].memory)]


@pytest.mark.parametrize(("steps", "lr_sum"), [(2, 0.5), (1, 0.25)])
def test_a_step_that_was_skipped_counts_for_nothing(steps, lr_sum):
    """The weights have gone `lr_sum` with gradients of 1, in however many steps."""
    method, turn = scaffold_turn()
    (found,) = method.train(None, [turn], Skipping(SimpleNamespace(steps=steps, lr_sum=lr_sum)))
    np.testing.assert_allclose(found.memory["w"], 1.0)
    np.testing.assert_allclose(found.end["control:w"], 1.0)


def test_a_turn_without_a_step_changes_no_control_variate():
    method, turn = scaffold_turn()
    turn = replace(turn, memory={"w": np.full((2, 2), 7.0, np.float32)})
    (found,) = method.train(None, [turn], Skipping(SimpleNamespace(steps=0, lr_sum=0.0)))
    assert found.memory is turn.memory and found.end.keys() == {"w"}


@pytest.mark.parametrize(("clients", "sites"), [(3, 0), (1, 3)])
def test_a_client_without_a_usable_update_lowers_the_share_of_those_that_trained(clients, sites):
    """Of three clients, whether they are in one job or each on a site of its own."""
    method, turn = scaffold_turn(clients, sites)
    (found,) = method.train(None, [turn], Skipping(SimpleNamespace(steps=1, lr_sum=0.25)))
    sent = 2 * method.encode(turn, found.end, 5.0)  # of two clients
    state = method.aggregate(turn.start, sent, 10.0, round=1).state
    np.testing.assert_allclose(state["control:w"], 2 / 3, rtol=1e-6)


@pytest.mark.parametrize(("sections", "sites"), [({"data": {"clients": 3}}, 0), ({}, 3)])
def test_the_clients_of_all_sites_are_known(sections, sites):
    from fedspeed.federation.rank_components import run_method
    from fedspeed.federation.state_agreement import RunArrays

    config = run_config(federation={"method": {"name": "scaffold"}}, **({"data": {"clients": 1}} | sections))
    method = run_method(config, RunArrays(WEIGHTS), sites=sites)
    assert method.all_clients == 3


@pytest.mark.parametrize(
    ("transport", "server", "sites"), [("gloo", (), 0), ("tls", (), 4), ("tls", (7,), 3)]
)
def test_sites_with_clients_are_counted_on_every_rank(transport, server, sites):
    from fedspeed.session.participant import count_sites

    config = run_config(routing={"transport": transport})
    job = SimpleNamespace(config=config, topology=SimpleNamespace(server=server))
    shared = []
    gateway = SimpleNamespace(share_from_gateway=lambda values: shared.append(values) or values)
    assert count_sites(job, gateway, SimpleNamespace(transport=SimpleNamespace(size=4))) == sites
    other = SimpleNamespace(share_from_gateway=lambda values: shared[0])
    assert count_sites(job, other, None) == sites


def scaffold_turn(clients=3, sites=0):
    """Return (the method for one matrix, the first turn of a client)."""
    from fedspeed.federation.methods.scaffold.method import Scaffold

    method = Scaffold(variant_of("scaffold")(), Layout.of(WEIGHTS), clients=clients, seed=0, sites=sites)
    return method, method.turn(0, 1, method.first_state(WEIGHTS), steps=2, seed=0, memory={})


# What one turn of FedProx adds.


@pytest.mark.parametrize(("alone", "added"), [(False, [0.5]), (True, [])])
def test_a_client_alone_is_not_drawn_back(alone, added):
    """Though its weights are read, as the passes that were declared say."""
    from fedspeed.federation.methods.fedprox.method import FedProx

    method = FedProx(variant_of("fedprox")(mu=MU), Layout.of(WEIGHTS), clients=3, seed=0)
    seen = []
    reads = []
    engine = SimpleNamespace(
        masters=lambda slot: reads.append(slot) or {"w": AsTensor(WEIGHTS["w"] + np.float32(0.5))},
        add_to_gradients=lambda slot, arrays, scale: seen.append((float(arrays["w"].max()), scale)),
    )
    trainer = SimpleNamespace(local_steps=lambda engine, turns, *, between: between(0, turns[0]))
    turn = method.turn(0, 1, WEIGHTS, steps=2, seed=0, memory={})
    method.train(engine, [method.turn_alone(0, WEIGHTS, steps=2, seed=0) if alone else turn], trainer)
    assert reads == [0] and seen == [(drift, MU) for drift in added]


class AsTensor:
    """Hold an array as a tensor does."""

    def __init__(self, array):
        self.numpy = lambda: array
