"""What a client is to do in a turn, as the trainer and the method say it together."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from fedspeed.data.clients import ClientData
from fedspeed.engine.client_engine import Sums
from fedspeed.federation.layout import Layout
from fedspeed.federation.methods.config import variant_of
from fedspeed.federation.methods.lora_average.method import LoraAverage
from fedspeed.federation.role import RankRole
from fedspeed.federation.trainer import Trainer, turn_seed
from tests.federation.runs import client_data
from tests.tiny import run_config

A = "x.q.lora_A.default.weight"
B = "x.q.lora_B.default.weight"
STATE = {A: np.ones((2, 3), np.float32), B: np.ones((4, 2), np.float32)}
CLIENT = 1


class OnlyB(LoraAverage):
    """A method that changes the turns of its clients."""

    def turn(self, client, round, state, **how):
        turn = super().turn(client, round, state, **how)
        return replace(turn, frozen=turn.frozen | {A}) if client == CLIENT else turn


def trainer(kind=LoraAverage, rule="avg_factors", share=0):
    """The trainer of one of a client's two ranks, and the options that its engine is loaded with."""
    config = run_config(train={"local_steps": 3}, federation={"rounds": 4}, run={"seed": 17})
    loads = []
    engine = SimpleNamespace(data_share=(2, share), load=lambda *state, **how: loads.append(how))
    method = kind(variant_of("lora_average")(rule=rule), Layout.of(STATE), clients=3, seed=17)
    role = RankRole(clients={CLIENT: ClientData([], [], pad_id=0)})
    return Trainer(config, role, engine, method), loads


@pytest.mark.parametrize(
    ("rule", "frozen"), [("avg_factors", set()), ("freeze_a", {A}), ("alternate", set())]
)
def test_a_client_alone_does_all_steps_and_need_not_alternate(rule, frozen):
    turn = trainer(rule=rule)[0].turn_alone(CLIENT, STATE)
    assert (turn.frozen, turn.steps, turn.round, turn.memory) == (frozen, 12, 0, {})
    assert turn.seed == turn_seed(17, CLIENT, 0)


def test_ranks_of_a_client_share_a_turns_seed_and_draw_dropout_apart():
    """The dropout of each by (run, client, round, share of the rows, exchange), which a resumed round finds
    again.
    """
    ranks = [trainer(share=share) for share in (0, 1)]
    turns = [own.turn(CLIENT, 3, STATE, steps=1, exchange=2) for own, _ in ranks]
    assert turns[0].seed == turns[1].seed != ranks[0][0].turn(CLIENT, 3, STATE, steps=1, exchange=1).seed
    for share, ((own, loads), turn) in enumerate(zip(ranks, turns)):
        own.begin(own._engine, [turn])
        key = [17, 0x7E4, CLIENT, 3, share, 2]
        assert [how["seed"] for how in loads] == [int(np.random.SeedSequence(key).generate_state(1)[0])]


@pytest.mark.parametrize("rule", ["avg_factors", "freeze_a"])
def test_a_method_that_changes_turns_changes_those_of_a_client_alone(rule):
    own = trainer(OnlyB, rule)[0]
    assert own.turn_alone(CLIENT, STATE).frozen == own.turn(CLIENT, 3, STATE, steps=1).frozen == {A}


def test_a_step_that_was_skipped_adds_no_learning_rate():
    """As fp16 skips one after an overflow."""
    config = run_config(train={"local_steps": 3, "lr": 0.4, "warmup_steps": 4}, federation={"rounds": 2})
    taken = iter([True, False, True])
    engine = SimpleNamespace(
        data_share=(1, 0),
        load=lambda *state, **how: None,
        gradients=lambda work: [Sums(loss=2.0, tokens=1)],
        step=lambda lr: [next(taken)],
        state=lambda slot: {},
    )
    method = LoraAverage(variant_of("lora_average")(), Layout.of(STATE), clients=3, seed=0)
    own = Trainer(config, RankRole(clients={CLIENT: client_data(CLIENT)}), engine, method)
    (trained,) = own.local_steps(engine, [own.turn(CLIENT, 1, STATE, steps=3)])
    assert (trained.sums.steps, trained.sums.tokens) == (2, 3)
    assert trained.sums.lr_sum == pytest.approx(0.1 + 0.3)
