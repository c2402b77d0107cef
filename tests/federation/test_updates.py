"""Transforms of updates: what leaves a client is transformed as a whole, and nothing tells what was there
before.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from fedspeed.engine.client_engine import Sums
from fedspeed.federation.checks import losses_problem, updates_problem
from fedspeed.federation.contribution import Contribution
from fedspeed.federation.layout import Layout
from fedspeed.federation.ledger import Ledger
from fedspeed.federation.link import Sum
from fedspeed.federation.methods.base import make_method, method_class
from fedspeed.federation.methods.config import variant_of as method_variant
from fedspeed.federation.methods.turns import Trained, Turn
from fedspeed.federation.overlap import deltas_from
from fedspeed.federation.recorder import Recorder, StopSignals, Training, held_out_loss
from fedspeed.federation.role import RankRole
from fedspeed.federation.updates.base import (
    TransformChain,
    UpdateTransform,
    hidden_by,
    make_transforms,
    shared_seed,
    transform_class,
)
from fedspeed.federation.updates.config import variant_of
from fedspeed.monitor.clock import StageClock
from fedspeed.monitor.metrics import registry
from fedspeed.monitor.metrics.metric import LOSSES, REVEALABLE, SKETCH
from fedspeed.monitor.metrics.metric import WEIGHTS as EXACT_WEIGHTS
from fedspeed.monitor.records import RoundRecord, summarise
from fedspeed.monitor.round_record import round_record
from tests.tiny import run_config

SHAPES = {"x.q.lora_A.default.weight": (3, 9), "x.q.lora_B.default.weight": (8, 3)}
WEIGHTS = (120.0, 31.0, 7.0)
A, B = SHAPES


def drawn(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {n: (scale * rng.standard_normal(s)).astype(np.float32) for n, s in SHAPES.items()}


def norm(delta):
    return sum(float((a.astype(np.float64) ** 2).sum()) for a in delta.values()) ** 0.5


def played(updates, **options):
    """(state, ends of the clients, as they are sent, weight of each, aggregate, values) of a round of three
    clients.
    """
    start = drawn(9)
    found = make_method(
        method_variant("lora_average")(**options), start, clients=3, seed=5, hides=updates.hides
    )
    ends = []
    sent_ends = []
    weights = []
    total = 0.0
    for client, weight in enumerate(WEIGHTS):
        turn = found.turn(client, 1, start, steps=1, seed=0, memory={})
        delta = {n: t for n, t in drawn(client, 0.1 * (client + 1)).items() if n not in turn.frozen}
        ends.append({n: start[n] + delta[n] if n in delta else start[n] for n in start})
        sent_ends.append(ends[-1])
        if updates:
            sent, weight = updates(turn, {n: ends[-1][n] - start[n] for n in start}, weight)
            sent_ends[-1] = {n: start[n] + sent[n] for n in start}
        weights.append(weight)
        total = total + found.encode(turn, sent_ends[-1], weight).astype(np.float64)
    result = found.aggregate(start, total.astype(np.float32), sum(weights), round=1)
    return start, ends, sent_ends, weights, result, found.values(1)


def deltas(start, ends):
    return [{n: end[n].astype(np.float64) - start[n] for n in start} for end in ends]


def test_the_aggregate_of_a_clipped_run_is_the_mean_of_clipped_deltas():
    updates = make_transforms([variant_of("clip")(norm=0.9)])
    start, ends, _, weights, result, _ = played(updates)
    lengths = [norm(delta) for delta in deltas(start, ends)]
    assert lengths[0] < 0.9 < lengths[1] < lengths[2]
    for name in SHAPES:
        clipped = [
            min(1.0, 0.9 / length) * delta[name] for length, delta in zip(lengths, deltas(start, ends))
        ]
        mean = sum(w * delta for w, delta in zip(WEIGHTS, clipped)) / sum(WEIGHTS)
        np.testing.assert_allclose(result.state[name], start[name] + mean, rtol=0, atol=1e-6)
    assert tuple(weights) == WEIGHTS and not updates.hides
    spent = updates.spent()
    assert (spent["clip_updates"], spent["clip_shortened"]) == (3, 2)
    assert spent["clip_norms"] == pytest.approx(sum(lengths), rel=1e-5)


def test_the_sketch_is_that_of_what_was_clipped():
    """So the averaging error that it estimates is the one that was made."""
    updates = make_transforms([variant_of("clip")(norm=0.9)])
    start, _, sent_ends, _, clipped, _ = played(updates)
    method = make_method(method_variant("lora_average")(), start, clients=3, seed=5)
    turns = [method.turn(client, 1, start, steps=1, seed=0, memory={}) for client in range(3)]
    total = sum(
        method.encode(turn, end, w).astype(np.float64) for turn, end, w in zip(turns, sent_ends, WEIGHTS)
    )
    expected = method.aggregate(start, total.astype(np.float32), sum(WEIGHTS), round=1)
    assert clipped.factor_error == expected.factor_error > 0
    assert clipped.factor_error < played(TransformChain([]))[4].factor_error, "smaller deltas, smaller error"


def test_only_what_trains_counts_for_the_norm():
    """And what is frozen stays as it is, to the bit."""
    start, ends, sent_ends, *_ = played(make_transforms([variant_of("clip")(norm=0.05)]), rule="freeze_a")
    for end, delta in zip(sent_ends, deltas(start, sent_ends)):
        assert end[A].tobytes() == start[A].tobytes()
        assert norm(delta) == pytest.approx(0.05, rel=1e-4)


def test_what_a_client_keeps_to_itself_is_not_clipped():
    """The A that FedSA sends is clipped by its own length, and the sketch sent with it is that of the
    client's own B.
    """
    from fedspeed.federation.methods.fedsa import FedSA

    start = drawn(9)
    own = drawn(1)
    away = drawn(2, 0.1)
    method = FedSA(method_variant("lora_average")(), Layout.of(start), clients=3, seed=5)
    turn = method.turn(0, 1, start, steps=1, seed=0, memory={B: own[B]})
    end = {A: start[A] + away[A], B: own[B] + 100 * away[B]}
    clipped = {A: start[A] + 0.5 * away[A], B: end[B]}
    updates = make_transforms([variant_of("clip")(norm=0.5 * norm({A: away[A]}))])
    contribution = Contribution.empty(method.values(1))
    trained = SimpleNamespace(end=end, sums=SimpleNamespace(steps=1))
    contribution.add(method, turn, trained, start=start, weight=2.0, transform=updates)
    expected = method.encode(turn, clipped, 2.0)
    np.testing.assert_allclose(contribution.vector, expected, rtol=1e-5, atol=1e-5)
    assert updates.spent()["clip_norms"] == pytest.approx(norm({A: away[A]}), rel=1e-5)


class Secret(UpdateTransform):
    """Adds up what it has spent; says nothing about what it hides."""

    steps = 0

    def __call__(self, delta, weight, rng):
        self.steps += 1
        return {n: a + rng.standard_normal(a.shape).astype(np.float32) for n, a in delta.items()}, weight

    def spent(self):
        return {"epsilon": 0.5 * self.steps}


def test_a_transform_that_says_nothing_hides_everything_but_the_update():
    """Its sketch is not sent, its clients count alike, and losses stay where they are."""
    updates = TransformChain(
        [transform_class("clip")(variant_of("clip")()), Secret(None), Secret(None)], (1,)
    )
    assert updates.hides == REVEALABLE
    start, _, sent_ends, weights, result, values = played(updates)
    assert weights == [1.0, 1.0, 1.0] and result.factor_error is None
    assert values == sum(a.size for a in start.values()), "no sketch"
    mean = {n: sum(end[n].astype(np.float64) for end in sent_ends) / 3 for n in start}
    for name in start:
        np.testing.assert_allclose(result.state[name], mean[name], rtol=0, atol=1e-6)
    assert updates.spent()["epsilon"] == 3.0


def noises(updates, client, deltas=1):
    """What a random transform makes of some zeros of a client, one after the other."""
    turn = Turn(client=client, round=1, start={}, frozen=frozenset(), steps=1, seed=0, memory={})
    zeros = {"w": np.zeros(4, np.float32)}
    return [updates(turn, zeros, 1.0)[0]["w"].tolist() for _ in range(deltas)]


def test_the_ranks_of_a_client_draw_the_same_and_nobody_else_does():
    """Whatever else these ranks carry. The seed is the gateway's, and another one in each start of a run."""
    said = []

    class Rank:
        """One of a client's ranks; the first is the gateway."""

        def share_from_gateway(self, values):
            said.append(values)
            return said[0]

    gateway, other = (TransformChain([Secret(None)], shared_seed(Rank())) for _ in range(2))
    assert said[0].tobytes() != said[1].tobytes()
    noises(gateway, 5)
    assert noises(gateway, 2, 3) == noises(other, 2, 3)
    assert noises(gateway, 1) != noises(gateway, 3), "clients draw apart"
    assert noises(TransformChain([Secret(None)]), 2) != noises(TransformChain([Secret(None)]), 2)


def test_what_is_hidden_is_known_before_anything_is_built():
    assert hidden_by([variant_of("clip")()]) == hidden_by([]) == frozenset()


def test_what_is_hidden_has_no_slot():
    """Not even as sums: the record has no value where they would be, and none of them is in the vector."""
    hides = TransformChain([Secret(None)]).hides
    ledger = Ledger(2, 1, hides=hides)
    sent_ends = {
        "asked": 1.0,
        "received": 1.0,
        "train_loss": 1e9,
        "tokens": 1e9,
        "val_loss": 1e9,
        "val_tokens": 3,
        "exact": 1e9,
        "rows": 2,
    }
    for client in range(2):
        ledger.add_client(client, **sent_ends)
    ledger.set_rank(0, ranks=1.0, wall_s=1.0, clip_norms=1e9, clip_updates=1.0)
    assert not (ledger.vector >= 1e9).any() and np.isfinite(ledger.vector).all()
    assert held_out_loss(ledger) is None
    record = round_record(
        Ledger(2, 1, ledger.vector, hides=hides),
        1,
        (0, 1),
        lr=0.1,
        factor_error=0.5,
        factor_error_exact=False,
        clipped=0,
    )
    hidden = (
        "train_loss",
        "val_loss",
        "val_exact",
        "tokens",
        "tokens_per_s",
        "factor_error",
        "unclipped_norm",
    )
    assert [getattr(record, name) for name in hidden] == [None] * len(hidden)
    assert [(client.train_loss, client.tokens) for client in record.per_client] == [(None, None)] * 2
    assert (record.clients, record.received, record.seconds) == (2, 2, 1.0)
    again = RoundRecord.from_json(record.to_json())
    assert again == record and summarise([record], status="finished", total_rounds=1).tokens_per_s is None


@pytest.mark.parametrize(
    ("hides", "gone"),
    [
        ({LOSSES}, {"train_loss", "val_loss", "val_tokens", "exact", "rows"}),
        ({EXACT_WEIGHTS}, {"train_loss", "tokens"}),
        ({SKETCH}, set()),
    ],
)
def test_a_slot_is_told_unless_a_metric_that_may_not_be_shown_is_all_that_it_is_for(hides, gone):
    """And a token count is no less of a secret under a loss than by itself."""
    hides = frozenset(hides)
    assert set(registry.slots("client", False)) - set(registry.slots("client", False, hides)) == gone


def test_runs_that_need_losses_go_with_nothing_that_hides_them():
    for setting, named in (({"compare_alone": True}, "compare_alone=true"), ({"patience": 2}, "patience=2")):
        config = run_config(federation={"updates": ({"name": "clip"},), **setting})
        assert losses_problem(config, frozenset({EXACT_WEIGHTS, SKETCH})) == ""
        sent_ends = losses_problem(config, REVEALABLE)
        assert "federation.updates (clip) hides losses" in sent_ends and named in sent_ends
    assert losses_problem(run_config(), REVEALABLE) == ""


def records_of_rounds(updates, mode, rounds):
    """The records of rounds in which one rank's clients bring these deltas."""
    engine = SimpleNamespace(
        groups=SimpleNamespace(client_size=1),
        device_bytes=0,
        take_bubble=lambda: (0.0, 0.0),
        take_step_s=lambda: 0.0,
        take_loaded=lambda: 0,
        sum_over_client=lambda vector: vector,
    )
    link = SimpleNamespace(
        sum=lambda vector, weight: Sum(
            vector=vector,
            weight=weight,
            idle_s=0.0,
            exchange_s=0.0,
            participants=1,
            clipped=0,
            skipped=False,
            bytes_sent=0,
        )
    )
    sent_ends = []
    recorder = Recorder(
        run_config(routing={"mode": mode}),
        RankRole(clients={}),
        engine,
        link,
        monitor=SimpleNamespace(round=sent_ends.append),
        clock=StageClock(),
        peak_bytes=lambda: 0,
        signals=StopSignals(lambda: False),
        spent=updates.spent,
    )
    for number, deltas_of_round in enumerate(rounds, 1):
        ledger = recorder.ledger()
        training = Training()
        recorder.begin_training(number)
        for delta in deltas_of_round:
            updates(SimpleNamespace(client=0, frozen=frozenset()), delta, 1.0)
        recorder.end_training(training)
        shared = recorder.sum_over_ranks(ledger, round=number, training=training)
        recorder.report(number, (), shared, factor_error_exact=False, clipped=0)
    return sent_ends


def test_a_round_tells_what_transforms_have_spent_in_it():
    """In masked modes only as far as the metric says; without transforms nothing is sent_ends."""
    short, long, longer = ({"w": np.array([value], np.float32)} for value in (0.5, 3.0, 4.0))
    rounds = [[short, long, longer, long], [short], []]
    for mode, norms in (("plain", [2.625, 0.5, None]), ("mask", [None] * 3)):
        sent_ends = records_of_rounds(make_transforms([variant_of("clip")(norm=1.0)]), mode, rounds)
        assert [record.shortened for record in sent_ends] == [0.75, 0.0, None]
        assert [record.unclipped_norm for record in sent_ends] == norms
    (record,) = records_of_rounds(TransformChain([]), "plain", rounds[:1])
    assert (record.shortened, record.unclipped_norm) == (None, None)


def test_what_is_spent_without_a_metric_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(transform_class("clip"), "spent", lambda self: {"epsilon": 0.0})
    with pytest.raises(ValueError, match="epsilon is spent, but no metric per rank has such a slot; add one"):
        make_transforms([variant_of("clip")()])
    assert "epsilon is spent" in updates_problem([variant_of("clip")()], method_class("lora_average"))


def test_what_a_server_is_told_before_the_sum_has_seen_no_transform(monkeypatch):
    clip = [variant_of("clip")()]
    averaging = method_class("lora_average")
    assert updates_problem(clip, averaging) == ""
    monkeypatch.setattr(averaging, "serve", lambda self, *how, asked: None)
    assert "federation.updates (clip) changes what clients send to the sum" in updates_problem(
        clip, averaging
    )
    assert updates_problem([], averaging) == ""


def test_only_what_trains_is_brought_to_one_number_of_steps():
    """What all know and nobody trains, such as a control variate, has no pace."""
    start = {"w": np.zeros(2, np.float32), "control:w": np.ones(2, np.float32)}
    end = {"w": np.full(2, 3.0, np.float32), "control:w": np.full(2, 2.0, np.float32)}
    found = deltas_from(start, end, 0.5)
    assert found["w"].tolist() == [1.5, 1.5] and found["control:w"].tolist() == [1.0, 1.0]


def test_a_contribution_of_another_length_than_was_announced_names_its_method():
    start = drawn(0)
    method = make_method(method_variant("lora_average")(), start, clients=3, seed=5)
    turn = method.turn(2, 4, start, steps=1, seed=0, memory={})
    trained = Trained(end=drawn(1), sums=Sums(steps=1), memory={})
    with pytest.raises(ValueError, match=r"LoraAverage.encode gives \(\d+,\) values for client 2 in round 4"):
        Contribution.empty(3).add(method, turn, trained, start=start, weight=1.0)
