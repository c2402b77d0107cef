"""`fedkseed`: whole runs against plain torch, and the weights of clients against what they send."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest

from fedspeed import activity
from fedspeed.data.batches import StepBatches
from fedspeed.engine.directions import direction
from fedspeed.federation.layout import Layout
from fedspeed.federation.methods.config import variant_of
from tests.federation.runs import (
    begin,
    federation,
    largest,
    run_worlds,
    same_bits,
    settings,
    share_of,
    tiny_llama,
)
from tests.processes import Scenarios, run_ranks

CLIENTS = (0, 1, 2)
EPSILON = 0.02  # of a size at which the difference of two fp32 losses is known to four digits
LR = 0.05
OPTIONS = {"name": "fedkseed", "seeds": 6, "epsilon": EPSILON}


def configured(base, *, adapter="lora", train=None, rounds=2, **options):
    return settings(
        base,
        train={"momentum": 0.0, "lr": LR, **(train or {})},
        adapter={"method": adapter},
        federation={"rounds": rounds, "method": OPTIONS | options},
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    return run_worlds((1,), on_one_rank, base, str(tmp_path_factory.mktemp("alone")))[0]


WHOLE = {
    "lora": {"perturbations": 2, "train": {"schedule": "linear"}},
    "full": {"adapter": "full", "draws": "common"},
}


def on_one_rank(world, base, folder):
    out = Scenarios()
    for name, options in WHOLE.items():
        config = configured(base, **options)
        out.play(name, run_and_by_hand, world, config, name, folder=folder)
    out.play("one round", start_and_end, world, configured(base, rounds=1), folder)
    return out


def start_and_end(world, config, folder):
    with federation(world, "one round", config, {0: CLIENTS}, folder) as fed:
        first = begin(fed)
        start = dict(first.state)
        return start, fed.run(first).state


def run_and_by_hand(world, config, name, folder):
    trained = []
    with federation(world, name, config, {0: CLIENTS}, folder) as fed:
        method = fed.parts.method
        train = method.train
        method.train = lambda engine, turns, trainer: noted(trained, turns, train(engine, turns, trainer))
        first = begin(fed)
        start = dict(first.state)
        state = fed.run(first).state
        expected = by_hand(config, method, start)
    return SimpleNamespace(start=start, state=state, trained=trained, by_hand=expected)


def noted(into, turns, found):
    into.extend(zip(turns, found, strict=True))
    return found


def by_hand(config, method, start):
    """Return the state after all rounds, in float64 but for the losses."""
    from fedspeed.federation.schedule import lr_at
    from tests.federation.plain import Plain

    plain = Plain(config)
    steps = config.train.local_steps
    whole = sum(map(share_of, CLIENTS))
    state = {name: array.astype(np.float64) for name, array in start.items()}

    def loss(weights, client, step):
        plain.load({name: array.astype(np.float32) for name, array in weights.items()})
        return plain.step_loss(client, step)

    for number in range(1, config.federation.rounds + 1):
        ends = []
        for client in CLIENTS:
            now = dict(state)
            seed = turn_seed_of(config, client, number)
            turn = method.turn(client, number, start, steps=steps, seed=seed, memory={})
            for step in range(steps):
                done = (number - 1) * steps + step
                lr = lr_at(config.train, done, config.federation.rounds * steps)
                way = dict.fromkeys(now, 0.0)
                drawn = method.drawn(turn, step)
                for j in drawn:
                    z = {n: direction(method.seed_of(j), n, array.shape) for n, array in now.items()}
                    plus = loss({n: now[n] + EPSILON * z[n] for n in now}, client, done)
                    minus = loss({n: now[n] - EPSILON * z[n] for n in now}, client, done)
                    for n in now:
                        way[n] = way[n] + (plus - minus) / (2 * EPSILON) / len(drawn) * z[n]
                now = {n: array - lr * way[n] for n, array in now.items()}
            ends.append(now)
        state = {n: sum(share_of(c) / whole * end[n] for c, end in zip(CLIENTS, ends)) for n in state}
    return state


def turn_seed_of(config, client, round):
    from fedspeed.federation.trainer import turn_seed

    return turn_seed(config.run.seed, client, round)


@pytest.mark.parametrize("name", WHOLE)
def test_a_run_learns_what_plain_torch_does(alone, name):
    found = alone[name]
    gone = largest(found.state, found.start)
    assert gone > 0.01 and largest(found.state, found.by_hand) < 2e-3 * gone


@pytest.mark.parametrize("name", WHOLE)
def test_the_state_is_the_mean_of_the_clients_weights(alone, name):
    """Though nobody has sent any."""
    found = alone[name]
    ends = {turn.client: trained.end for turn, trained in found.trained if turn.round == 2}
    whole = sum(map(share_of, CLIENTS))
    mean = {n: sum(share_of(c) / whole * ends[c][n].astype(np.float64) for c in CLIENTS) for n in found.state}
    assert largest(found.state, mean) < 1e-6


def test_which_directions_are_drawn():
    def drawn(draws, client, round, step):
        method = method_of(LAYOUT, draws=draws, seeds=1000, perturbations=3)
        turn = method.turn(client, round, {}, steps=2, seed=10 * round + client, memory={})
        return tuple(method.drawn(turn, step))

    places = [(client, round, step) for client in CLIENTS for round in (1, 2) for step in (0, 1)]
    own = {place: drawn("own", *place) for place in places}
    common = {place: drawn("common", *place) for place in places}
    assert len(set(own.values())) == len(places)
    assert len(set(common.values())) == 4
    assert all(common[place] == common[0, *place[1:]] for place in places)
    method = method_of(LAYOUT, seeds=4096)
    assert len({method.seed_of(j) for j in range(4096)}) == 4096
    assert method.seed_of(3) == 6250449947678548300 < 2**63, "as always: a journal has amounts of them"


# One turn, on an engine that is a formula.

LAYOUT = Layout(("a", "b"), ((40, 30), (50,)))
MANY = 200  # steps


def method_of(layout, **options):
    from fedspeed.federation.methods.fedkseed.method import FedKSeed

    config = variant_of("fedkseed")(**{"seeds": 6, "epsilon": 0.5, **options})
    return FedKSeed(config, layout, clients=3, seed=11)


class Bowl:
    """An engine whose loss is half of the squared distance from 3, on two ranks with half of it each."""

    def __init__(self, broken_at):
        self.broken_at = broken_at
        self.evaluated = 0

    def measured(self):
        return contextlib.nullcontext()

    def end_step(self):
        pass

    def load(self, state):
        self.now = {name: value.clone() for name, value in state.items()}

    def perturb(self, slot, seed, scale):
        from fedspeed.engine.directions import perturbed

        self.now = perturbed(self.now, seed, scale)

    def evaluate(self, work):
        from fedspeed.engine.client_engine import Sums

        ((_,),) = work
        self.evaluated += 1
        activity.advance()
        loss = sum(float(((value.double() - 3) ** 2).sum()) for value in self.now.values()) / 4
        return [Sums(loss=float("nan") if self.evaluated in self.broken_at else loss, tokens=5)]

    def sum_over_client(self, values):
        return 2 * values


class Steps:
    """A trainer of one batch a step, with ten answer tokens on both ranks together."""

    def __init__(self):
        self.taken = []
        self.shown = []

    def shown_progress(self, turns):
        return activity.during("round 1", turns[0].steps, "local step")

    def rows(self, turn, number):
        return StepBatches(["batch"], 10)

    def lr(self, turn, number):
        return 1e-3 / (number + 1)

    def stepped(self, turns, number, done):
        self.shown.append(activity.current().done)
        activity.advance()
        self.taken += [sums.steps for sums in done]


def one_turn(broken_at, steps):
    """Return (turn, result, what the trainer was told of each step)."""
    trainer = Steps()
    method = method_of(LAYOUT)
    rng = np.random.default_rng(4)
    start = {n: rng.standard_normal(s).astype(np.float32) for n, s in zip(LAYOUT.names, LAYOUT.shapes)}
    turn = method.turn(1, 1, start, steps=steps, seed=5, memory={})
    (trained,) = method.train(Bowl(broken_at), [turn], trainer)
    assert trainer.shown == list(range(steps)), "local steps before each, in which a batch is evaluated twice"
    return turn, trained, trainer.taken


def all_turns(rank):
    return {
        "many": one_turn((), MANY),
        "one": one_turn((), 1),
        "first broken": one_turn((2,), 2),
        "both broken": one_turn((2, 3), 2),
    }


@pytest.fixture(scope="module")
def turns():
    return run_ranks(1, all_turns)[0]


def test_the_end_of_a_turn_is_its_start_less_its_steps_to_rounding(turns):
    """Shifts of half the size of the weights leave no trace, in however many steps. The weights are below 8,
    and a step rounds its way and the weights once each, at random to either side.
    """
    bound = 2 * MANY**0.5 * 2.0**-22
    turn, trained, _ = turns["many"]
    method = method_of(LAYOUT)
    amounts = trained.end["seeds:amounts"]
    for name, shape in zip(LAYOUT.names, LAYOUT.shapes):
        way = sum(amounts[j] * direction(method.seed_of(j), name, shape).astype(np.float64) for j in range(6))
        off = np.abs(trained.end[name] - (turn.start[name] - way)).max()
        assert off < bound and np.abs(way).max() > 0.1
    encoded = method.encode(turn, trained.end, 2.5)
    assert encoded.shape == (method.values(1),) and encoded.dtype == np.float32
    rebuilt = method.aggregate(turn.start, encoded, 2.5, round=1).state
    assert largest(rebuilt, {n: trained.end[n] for n in rebuilt}) < bound


def test_a_slope_is_that_of_the_mean_loss_over_all_ranks(turns):
    """Which is exact for a loss of second order, whatever the shift."""
    turn, trained, _ = turns["one"]
    method = method_of(LAYOUT)
    (j,) = np.flatnonzero(trained.end["seeds:amounts"])
    z = {n: direction(method.seed_of(j), n, shape) for n, shape in zip(LAYOUT.names, LAYOUT.shapes)}
    slope = sum(float(((turn.start[n].astype(np.float64) - 3) * z[n]).sum()) for n in z) / 10
    assert trained.end["seeds:amounts"][j] == pytest.approx(1e-3 * slope, rel=1e-5)


def test_a_step_whose_loss_is_not_finite_is_not_taken(turns):
    _, trained, taken = turns["first broken"]
    assert (taken, trained.sums.steps, trained.sums.tokens) == ([0, 1], 1, 10)
    assert all(np.isfinite(array).all() for array in trained.end.values())
    turn, trained, taken = turns["both broken"]
    assert (taken, trained.sums.steps) == ([0, 0], 0)
    assert same_bits({n: trained.end[n] for n in turn.start}, turn.start)


# Several ranks.

WORLDS = {  # number of ranks, clients by rank, kind of engine, local steps
    "two ranks": (2, {0: CLIENTS, 1: CLIENTS}, "zero2", {"micro_batch": 1}),
    "divided base": (2, {0: (0, 2), 1: (1,)}, "cluster", {"micro_batch": 1, "accumulation": 2}),
    "unequal clients": (3, {0: (0,), 1: (0,), 2: (1, 2)}, "zero3", {"micro_batch": 1}),
}


@pytest.mark.parametrize("name", WORLDS)
def test_all_ranks_have_the_same_bits(base, tmp_path, name, alone):
    """And the weights of one rank, where clients see the same rows."""
    ranks, carries, kind, train = WORLDS[name]
    config = configured(base, rounds=1, train=train)
    states = run_worlds((ranks,), end_of, name, config, carries, str(tmp_path), kind=kind)
    assert all(same_bits(state, states[0]) for state in states)
    if name != "unequal clients":
        start, end = alone["one round"]
        assert largest(states[0], end) < 2e-3 * largest(start, end)


def end_of(world, name, config, carries, folder, *, kind="zero0"):
    """Return the state after all rounds."""
    with federation(world, name, config, carries, folder, kind=kind) as fed:
        return fed.run(begin(fed)).state
