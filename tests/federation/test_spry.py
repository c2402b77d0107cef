"""SPRY: who trains what, what is sent and what becomes of it, and whole runs against the same by hand."""

import re
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from fedspeed.config.check import problems
from fedspeed.engine.directions import combined, direction
from fedspeed.errors import ConfigError
from fedspeed.federation.checks import check_method, least_participants
from fedspeed.federation.methods.base import make_method
from fedspeed.federation.methods.config import variant_of
from fedspeed.federation.methods.spry.forward_slices import direction_seeds
from fedspeed.federation.methods.spry.slices import fewest_holders, holders, units_of
from fedspeed.federation.schedule import sample_clients
from fedspeed.federation.trainer import Trainer, turn_seed
from fedspeed.planner.plan import Task
from tests.federation.one_round import SHAPES, drawn
from tests.federation.runs import largest, run_worlds, settings, share_of, tiny_llama
from tests.tiny import run_config

NAMES = sorted(SHAPES)
Q, V = (tuple(name for name in NAMES if f".{part}." in name) for part in "qv")
SIZES = [(4, 1, 1), (4, 3, 1), (4, 4, 1), (4, 4, 2), (3, 8, 1), (3, 8, 4), (14, 5, 3), (1, 5, 2), (5, 2, 9)]


# Who trains what.


def held_in(units, clients, least, round, exchange=0):
    return holders(units, range(clients), least=least, seed=3, round=round, exchange=exchange)


def test_a_unit_is_a_lora_module_or_a_single_weight():
    names = [*SHAPES, "x.q.lora_B.default.bias", "x.norm.weight", "x.e.lora_embedding_A.default"]
    assert units_of(names) == (
        ("x.e.lora_embedding_A.default",),
        ("x.norm.weight",),
        tuple(sorted([*Q, "x.q.lora_B.default.bias"])),
        V,
    )


@pytest.mark.parametrize(("units", "clients", "least"), SIZES)
def test_every_unit_has_its_clients_and_every_client_its_units(units, clients, least):
    for round in range(1, 2 * clients + 2):
        held = held_in(units, clients, least, round)
        assert len(held) == units
        assert all(len(set(of_unit)) == len(of_unit) >= min(least, clients) for of_unit in held)
        counts = [sum(client in of_unit for of_unit in held) for client in range(clients)]
        assert min(counts) >= 1 and max(counts) - min(counts) <= 1
        if clients < units * least:
            assert {len(of_unit) for of_unit in held} == {min(least, clients)}


@pytest.mark.parametrize(("units", "clients", "least"), SIZES)
def test_every_client_trains_every_unit(units, clients, least):
    """Within as many rounds as there are clients, from the first of a cycle on."""
    for first in (1, clients + 1):
        seen = {
            (unit, client)
            for round in range(first, first + clients)
            for unit, of_unit in enumerate(held_in(units, clients, least, round))
            for client in of_unit
        }
        assert len(seen) == units * clients


def test_the_order_of_clients_is_drawn_anew():
    cycles = [tuple(held_in(8, 8, 1, 1 + 8 * cycle)) for cycle in range(6)]
    assert len(set(cycles)) == 6
    assert held_in(8, 8, 1, 2) != held_in(8, 8, 1, 1) == held_in(8, 8, 1, 1)
    assert len({held_in(8, 8, 1, 1, exchange) for exchange in range(8)}) == 8


@pytest.mark.parametrize(("units", "clients", "least"), SIZES)
@pytest.mark.parametrize("gateways", [1, 2, 3, 20])
def test_as_many_participants_are_promised_as_there_are(units, clients, least, gateways):
    speaks = {client: client % gateways for client in range(clients)}
    promised = fewest_holders(units, speaks, least)
    rounds = [held_in(units, clients, least, round) for round in range(1, 60)]
    found = min(len({speaks[c] for c in of_unit}) for held in rounds for of_unit in held)
    assert 1 <= promised <= found
    if gateways >= clients:
        assert promised == found


def test_without_the_number_of_units_only_what_is_asked_for_is_promised():
    assert fewest_holders(0, {client: client for client in range(9)}, 2) == 2


# What is sent, and what becomes of it.


def method_of(name="spry", shapes=SHAPES, clients=3, clients_per_round=0, **options):
    config = variant_of(name)(**options)
    start = drawn(0, shapes)
    return make_method(config, start, clients=clients, seed=5, clients_per_round=clients_per_round)


def turn_of(method, client, round, exchange=0, start=None):
    state = start or drawn(99, dict(zip(method.layout.names, method.layout.shapes)))
    seed = turn_seed(5, client, round, exchange=exchange)
    return method.turn(client, round, state, steps=1, seed=seed, memory={}, exchange=exchange)


def trains(method, client, round):
    return set(method.layout.names) - turn_of(method, client, round).frozen


@pytest.mark.parametrize("clients_per_round", [0, 2])
def test_clients_of_a_round_train_all_units_together(clients_per_round):
    method = method_of(clients=5, clients_per_round=clients_per_round)
    for round in range(1, 6):
        clients = sample_clients(5, round, 5, clients_per_round)
        assert method.round_clients(round) == clients
        assert set().union(*(trains(method, client, round) for client in clients)) == set(NAMES)
        if clients_per_round:
            assert sorted(map(sorted, (trains(method, c, round) for c in clients))) == [list(Q), list(V)]


def test_a_client_alone_trains_everything():
    assert method_of().turn_alone(1, drawn(99), steps=7, seed=0).frozen == frozenset()


def test_directions_differ_over_client_round_step_and_number():
    """In the original, one seed made all of them equal."""
    assert direction_seeds([11, 2], 2)[1] == 1044159368234849222, "as always: a resumed round draws the same"
    method = method_of(perturbations=3)
    seeds = [
        seed
        for client in range(3)
        for round in (1, 2)
        for step in (0, 1)
        for seed in method.seeds(turn_of(method, client, round), step)
    ]
    assert len(set(seeds)) == 3 * 2 * 2 * 3
    each = method_of("spry_iteration", perturbations=3)
    places = [(client, round, exchange) for client in range(3) for round in (1, 2) for exchange in (0, 1)]
    by_client = [each.seeds(turn_of(each, c, round, exchange), 0) for c, round, exchange in places]
    assert by_client[:4] == by_client[4:8] == by_client[8:], "all clients draw the same"
    assert len(set(sum(by_client[:4], []))) == 2 * 2 * 3
    assert not np.array_equal(direction(seeds[0], Q[0], (3, 9)), direction(seeds[1], Q[0], (3, 9)))


WEIGHTS = (120.0, 31.0, 7.0, 40.0)


@pytest.mark.parametrize("weighting", ["tokens", "equal"])
@pytest.mark.parametrize("missing", [(), (1,)])
def test_each_unit_is_the_mean_over_its_own_clients(weighting, missing):
    method = method_of(clients=4, clients_per_unit=3, weighting=weighting)
    start = drawn(99)
    sums = {name: np.zeros(SHAPES[name]) for name in NAMES}
    counts = dict.fromkeys(NAMES, 0.0)
    total = np.zeros(method.values(2))
    for client, weight in enumerate(WEIGHTS):
        turn = turn_of(method, client, 2, start=start)
        end = {n: t + drawn(client, SHAPES, 0.1)[n] for n, t in start.items()}
        vector = method.encode(turn, end, weight)
        assert vector.dtype == np.float32 and vector.size == sum(method.segments(2)) == 105 + 2
        share = weight if weighting == "tokens" else 1.0
        parts = method.layout.unflatten(vector)
        assert {name for name in NAMES if parts[name].any()} == set(NAMES) - turn.frozen
        if client in missing:
            continue
        total += vector
        for name in set(NAMES) - turn.frozen:
            sums[name] += share * (end[name].astype(np.float64) - start[name])
            counts[name] += share
    state = method.aggregate(start, total.astype(np.float32), sum(WEIGHTS), round=2).state
    for name in NAMES:
        np.testing.assert_allclose(state[name], start[name] + sums[name] / counts[name], atol=1e-6)
    assert len(set(counts.values())) > 1 or weighting == "equal"


def test_a_unit_of_which_nothing_arrives_keeps_its_values():
    method = method_of(clients=2, weighting="equal")
    start = drawn(99)
    turn = turn_of(method, 0, 1, start=start)
    end = {n: t + 1 for n, t in start.items()}
    noise = 1e-4 * np.ones(method.values(1), np.float32)  # as of a masked sum
    state = method.aggregate(start, method.encode(turn, end, 3.0) + noise, 3.0, round=1).state
    for name in NAMES:
        expected = start[name] if name in turn.frozen else start[name] + 1
        np.testing.assert_allclose(state[name], expected, atol=1e-3)
        assert name not in turn.frozen or np.array_equal(state[name], start[name])


def test_derivatives_of_several_clients_become_one_step():
    method = method_of("spry_iteration", clients=4, clients_per_unit=3, perturbations=2)
    start = drawn(99)
    rng = np.random.default_rng(1)
    total = np.zeros(method.values(2))
    assert total.size == 2 * 2 + 2
    expected = {name: np.zeros(SHAPES[name]) for name in NAMES}
    counts = dict.fromkeys(NAMES, 0.0)
    for client, weight in enumerate(WEIGHTS):
        turn = turn_of(method, client, 2, 1, start=start)
        factors = rng.standard_normal(2)
        total += method.encode(turn, {"spry:derivatives": factors}, weight)
        for name in set(NAMES) - turn.frozen:
            counts[name] += weight
            expected[name] += weight * combined({name: SHAPES[name]}, method.seeds(turn, 0), factors)[name]
    state = method.aggregate(start, total.astype(np.float32), sum(WEIGHTS), round=2, exchange=1).state
    for name in NAMES:
        np.testing.assert_allclose(state[name], start[name] - expected[name] / counts[name], atol=2e-6)


def test_derivatives_are_clipped():
    method = method_of(derivative_clip=2.0, perturbations=4)
    np.testing.assert_allclose(method.mean_factors(np.array([1.0, -3.0, 5.0, 0.5])) * 4, [1, -2, 2, 0.5])
    np.testing.assert_allclose(method_of().mean_factors(np.array([7.0])), [7])


class Diverging:
    """An engine whose derivatives are finite in some steps only."""

    def __init__(self, *finite):
        self.finite = list(finite)
        self.calls = []
        self.pending = []

    def forward_gradients(self, work, seeds, names):
        from fedspeed.engine.client_engine import ForwardDerivatives, Sums

        values = [1.0 if self.finite.pop(0) else np.inf for _ in work]
        return [ForwardDerivatives(Sums(loss=1.0, tokens=3), np.array([value, 2.0])) for value in values]

    def add_to_gradients(self, slot, arrays, scale):
        assert scale == 1 and all(np.isfinite(array).all() for array in arrays.values())
        self.calls.append(slot)
        self.pending.append(True)

    def step(self, lr):
        self.calls.append("step")
        taken = self.pending
        self.pending = []
        return taken

    def end_step(self):
        self.calls.append("end")

    def state(self, slot):
        return {}


class Quiet:
    """A trainer that reports nothing."""

    local_steps = Trainer.local_steps

    def begin(self, engine, turns):
        pass

    def shown_progress(self, turns):
        return nullcontext()

    def rows(self, turn, number):
        pass

    def lr(self, turn, number):
        return 0.5

    def stepped(self, turns, number, done):
        pass


def test_a_step_without_a_finite_derivative_is_not_taken():
    method = method_of(perturbations=2)
    turn = replace(turn_of(method, 0, 1), steps=3)
    engine = Diverging(True, False, True)
    (trained,) = method.train(engine, [turn], Quiet())
    assert engine.calls == [0, "step", "end", 0, "step"]
    assert (trained.sums.steps, trained.sums.tokens, trained.sums.lr_sum) == (2, 9, 1.0)
    each = method_of("spry_iteration", perturbations=2)
    for finite in (True, False):
        (trained,) = each.train(Diverging(finite), [turn_of(each, 0, 1)], Quiet())
        assert trained.sums.steps == int(finite)
    np.testing.assert_allclose(
        each.train(Diverging(True), [turn_of(each, 0, 1)], Quiet())[0].end["spry:derivatives"], [0.25, 0.5]
    )


def test_turns_of_different_lengths_are_trained_together():
    """As where a round is an epoch; a step that one client does not take is taken by the other."""
    method = method_of(perturbations=2)
    turns = [replace(turn_of(method, client, 1), steps=3 - client) for client in (0, 1)]
    engine = Diverging(True, True, False, True, True)
    first, second = method.train(engine, turns, Quiet())
    assert engine.calls == [0, 1, "step", 1, "step", 0, "step"]
    assert [(t.sums.steps, t.sums.tokens) for t in (first, second)] == [(2, 9), (2, 6)]


def test_traffic_is_that_of_the_slices():
    """What clients fill is contributed, and the sums go to everybody."""
    method = method_of(shapes={f"x.{n}.lora_A.default.weight": (1, 999) for n in "abc"})
    whole = 2 / 3 * (3 * 999 + 3) * 4
    assert method.traffic(Task(shape=None, clients=3), 3).sent == pytest.approx(whole * (1 + 1 / 3))
    shared = method_of(clients_per_unit=2)
    sent = 2 / 3 * (105 + 2) * 4 * (1 + 4 / 2 / 3)
    assert shared.traffic(Task(shape=None, clients=3), 3) == pytest.approx((sent, sent))
    each = method_of("spry_iteration")
    sent = 2 / 3 * (2 + 2) * 4 * 2 * 7  # a client's values are single ones between those of others
    assert each.traffic(Task(shape=None, clients=3, local_steps=7), 3) == pytest.approx((sent, sent))


# What it can be combined with.


def configured(name="spry", options=None, **sections):
    config = run_config(**sections)
    method = variant_of(name)(**(options or {}))
    return replace(config, federation=replace(config.federation, method=method))


def spoken(count):
    return {client: client for client in range(count)}


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.setattr("fedspeed.federation.checks.adapted_modules", lambda config, client=None: 4)


def test_masked_modes_take_units_of_enough_clients(modules):
    masked = {"mode": "mask", "min_participants": 3}
    shared = configured(options={"clients_per_unit": 4, "weighting": "equal"}, routing=masked)
    check_method(shared, spoken(5), "stock")
    assert least_participants(shared, spoken(5)) == 4
    check_method(configured(routing=masked), spoken(12), "stock")
    for count, per_unit in ((11, 1), (5, 2)):
        config = configured(options={"clients_per_unit": per_unit}, routing=masked)
        with pytest.raises(ConfigError, match=f"spry: only 2 of {count} participants may contribute"):
            check_method(config, spoken(count), "stock")


BROKEN = [
    ({"options": {"clients_per_unit": 4}, "data": {"clients": 3}}, "a round has 3 clients"),
    ({"model": {"dtype": "fp16"}}, "overflow in model.dtype=fp16.*set model.dtype=bf16 or fp32"),
    ({"routing": {"transport": "tls"}}, "each site numbers its own"),
    (
        {"routing": {"mode": "mask"}},
        "weighting=tokens sums the weights.*set federation.method.weighting=equal",
    ),
    ({"federation": {"staleness": 1}}, "does not declare that late updates may be added"),
    ({"federation": {"local_optimizer": "keep"}}, "federation.local_optimizer=keep"),
    ({"name": "spry_iteration"}, "train.optimizer=adamw would have no effect; set train.optimizer=sgd"),
    ({"name": "spry_iteration", "train": {"clip": 1.0}}, "train.clip=1.0 would have no effect"),
    ({"name": "spry_iteration", "routing": {"mode": "mask"}}, "needs every client's own values"),
]


@pytest.mark.parametrize(("sections", "message"), BROKEN)
def test_what_does_not_fit_is_refused(sections, message):
    found = problems(configured(**sections))
    assert any(re.search(message, text) for text in found), found


def test_engines_without_forward_gradients_are_refused():
    plain = configured(routing={"mode": "plain"})
    for name in ("spry", "spry_iteration"):
        with pytest.raises(ConfigError, match=f"federation.method={name} needs .*streamed is not"):
            check_method(configured(name, routing={"mode": "plain"}), spoken(3), "streamed")
    client = SimpleNamespace(deepspeed={"zero_optimization": {"stage": 3}})
    with pytest.raises(ConfigError, match="stock with zero_optimization.stage=3 is not"):
        check_method(plain, spoken(3), "stock", client=client)


# Whole runs.

ROUNDS = 2
STEPS = 2
DIRECTIONS = 2
YOGI = {
    "server_optimizer": "yogi",
    "server_lr": 0.5,
    "server_momentum": 0.5,
    "server_beta2": 0.5,
    "server_tau": 0.2,
}


def played(world, base, folder):
    """By method: (states at the start and after every round, records, states by hand, losses by hand)."""
    from tests.federation.runs import course

    out = {}
    for name, server in product(("spry", "spry_iteration"), (None, YOGI)):
        config = settings(
            base,
            train={"momentum": 0.0, "lr": 0.05, "local_steps": STEPS},
            federation={
                "rounds": ROUNDS,
                "method": {"name": name, "perturbations": DIRECTIONS, "clients_per_unit": 2},
                **(server or {}),
            },
        )
        case = f"{name}, yogi" if server else name
        found = course(world, case, config, carries={0: (0, 1, 2)}, folder=folder)
        hand = by_round if name == "spry" else by_step
        out[case] = (found.states, found.records, hand(config, found.states[0], Yogi() if server else None))
    return out


class Yogi:
    """FedYogi by hand (Reddi et al., ICLR 2021, algorithm 2), in float64."""

    def __init__(self):
        self.m = {}
        self.v = {}

    def __call__(self, old, target):
        """Return the state after a step from `old` towards the mean of the clients, `target`."""
        beta1, beta2, tau, lr = (YOGI[f"server_{name}"] for name in ("momentum", "beta2", "tau", "lr"))
        new = {}
        for name, x in old.items():
            delta = target[name].astype(np.float64) - x
            v = self.v.get(name, tau**2)
            assert (delta**2 < 0.5 * v).all(), "rounding does not decide about the sign"
            self.m[name] = beta1 * self.m.get(name, 0.0) + (1 - beta1) * delta
            self.v[name] = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
            new[name] = (x + lr * self.m[name] / (np.sqrt(self.v[name]) + tau)).astype(np.float32)
        return new


def of_clients(config, state, round, exchange):
    """Yield (client, names that it trains) by units, for a method's map."""
    names = sorted(state)
    units = units_of(names)
    held = holders(len(units), (0, 1, 2), least=2, seed=config.run.seed, round=round, exchange=exchange)
    for client in range(3):
        yield client, [name for unit, of_unit in zip(units, held) if client in of_unit for name in unit]


def along(plain, client, step, seeds, names):
    """Return derivatives by backpropagation, along directions drawn anew."""
    gradient = plain.gradient(client, step)
    return np.array([
        sum(float((gradient[n].numpy() * direction(seed, n, gradient[n].shape)).sum()) for n in names)
        for seed in seeds
    ])


def step_along(config, state, names, seeds, factors):
    """Return the state after a step of SGD on an estimate."""
    estimate = {
        n: sum(f / len(seeds) * direction(s, n, state[n].shape) for s, f in zip(seeds, factors))
        for n in names
    }
    return {n: t - config.train.lr * estimate.get(n, 0.0) for n, t in state.items()}


def by_round(config, start, server=None):
    """Return the end states of every round, and the last held-out loss.

    Args:
        server: takes the step of the server optimizer, with (the state before, the mean of the clients).
    """
    from tests.federation.plain import Plain

    plain = Plain(config)
    states = [start]
    for round in range(1, ROUNDS + 1):
        sums = {n: np.zeros(t.shape) for n, t in start.items()}
        weights = dict.fromkeys(start, 0.0)
        for client, names in of_clients(config, start, round, 0):
            state = states[-1]
            for number in range(STEPS):
                plain.load(state)
                seeds = direction_seeds([turn_seed(config.run.seed, client, round), number], DIRECTIONS)
                factors = along(plain, client, (round - 1) * STEPS + number, seeds, names)
                state = {
                    n: t.astype(np.float32)
                    for n, t in step_along(config, state, names, seeds, factors).items()
                }
            for name in names:
                sums[name] += share_of(client) * (state[name].astype(np.float64) - states[-1][name])
                weights[name] += share_of(client)
        mean = {n: (t + sums[n] / weights[n]).astype(np.float32) for n, t in states[-1].items()}
        states.append(server(states[-1], mean) if server else mean)
    plain.load(states[-1])
    return states, plain.held_out_loss()


def by_step(config, start, server=None):
    """Return the same of an exchange in every step, each with a step of the server optimizer."""
    from tests.federation.plain import Plain

    plain = Plain(config)
    states = [start]
    state = start
    for round in range(1, ROUNDS + 1):
        for exchange in range(STEPS):
            plain.load(state)
            seeds = direction_seeds([config.run.seed, round, exchange], DIRECTIONS)
            sums = {n: np.zeros(DIRECTIONS) for n in start}
            weights = dict.fromkeys(start, 0.0)
            for client, names in of_clients(config, start, round, exchange):
                factors = along(plain, client, (round - 1) * STEPS + exchange, seeds, names)
                for name in names:
                    sums[name] += share_of(client) * factors
                    weights[name] += share_of(client)
            before = state
            for name in start:
                state = step_along(config, state, [name], seeds, sums[name] / weights[name])
            state = server(before, state) if server else state
        states.append(state)
    plain.load(state)
    return states, plain.held_out_loss()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    base = tiny_llama(tmp_path_factory.mktemp("base") / "llama")
    return run_worlds((1,), played, base, str(tmp_path_factory.mktemp("runs")))[0]


@pytest.mark.parametrize("name", ["spry", "spry_iteration", "spry, yogi", "spry_iteration, yogi"])
def test_a_run_is_the_same_by_hand(runs, name):
    """By hand, the derivatives are those of backpropagation."""
    states, records, (expected, loss) = runs[name]
    assert len(states) == len(expected) == ROUNDS + 1
    for state, end in zip(states[1:], expected[1:]):
        assert largest(state, end) < 2e-6
    assert largest(states[1], states[0]) > 1e-3
    assert records[-1].val_loss == pytest.approx(loss, rel=2e-6)
    assert records[-1].val_loss < records[0].val_loss
    assert [c.local_steps for c in records[-1].per_client] == [STEPS] * 3
