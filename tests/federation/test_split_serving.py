"""What the server of split learning does with messages, whatever its blocks compute."""

from types import SimpleNamespace

import numpy as np
import pytest

from fedspeed.engine.split.messages import Limits, NotFiniteError
from fedspeed.errors import FedSpeedError
from fedspeed.federation.layout import Layout
from fedspeed.federation.methods.config import variant_of
from fedspeed.federation.methods.m2fedsa.method import M2FedSA
from fedspeed.federation.methods.turns import TurnSize

STATE = {
    "x.q.lora_A.default.weight": np.ones((1, 2), np.float32),
    "x.q.lora_B.default.weight": np.ones((2, 1), np.float32),
}
SIZE = TurnSize(steps=2, micro_batches=2, rows=3, tokens=7)
STEP = ("hidden lengths", "output_gradient", "hidden lengths", "output_gradient last")
TURN = (*STEP, *STEP, "end")
RANKS = (2, 1, 1)
TRAINER = SimpleNamespace(turn_size=SIZE, round_lr=lambda round, step: 10 * round + step)


class Body:
    """Blocks that note what they are asked.

    Args:
        bad: number of the message that is not finite, from 0.
    """

    def __init__(self, bad=None):
        self.bad = bad
        self.most = []
        self.rates = {}

    def load(self, state, seed=0, slot=0):
        self.rates.setdefault(slot, [])

    def answer(self, slot, message, *, most, train):
        self.most.append(most)
        if len(self.most) - 1 == self.bad:
            raise NotFiniteError("a message is not finite")
        return {"answer": np.zeros(0)}

    def ends_step(self, message):
        return "last" in message

    def step(self, lr, only):
        (slot,) = only
        self.rates[slot].append(lr)

    def state(self, slot=0):
        return {}


class Wire:
    """The channel to participants 0, which speaks for clients 0 and 1, and 1, which speaks for client 2."""

    speakers = (0, 0, 1)
    ranks = RANKS

    def __init__(self, *messages):
        self.messages = [list(of_speaker) for of_speaker in messages]
        self.heard = []

    def receive(self, speaker):
        self.heard.append(speaker)
        return {name: np.zeros(0) for name in self.messages[speaker].pop(0).split()}

    def send(self, speaker, arrays):
        assert speaker == self.heard[-1]


def served(body, *messages, round=1, bad=None):
    """Serve clients 0 and 2 of a round.

    Args:
        bad: see `Body`.
    """
    method = M2FedSA(variant_of("m2fedsa")(body=body), Layout.of(STATE), clients=3, seed=0)
    blocks = Body(bad)
    wire = Wire(*messages)
    method.serve(blocks, wire, round, 0, clients=(0, 2), state=STATE, trainer=TRAINER)
    return method, blocks, wire


def stepped(method, round):
    return method.server_step(STATE, None, None, round=round, exchange=0, trainer=TRAINER)


@pytest.mark.parametrize(
    ("body", "rates", "heard"),
    [
        ("shared", {0: [30, 31, 30, 31]}, [0] * len(TURN) + [1] * len(TURN)),
        ("per_client", {0: [30, 31], 1: [30, 31]}, [0, 1] * len(TURN)),
    ],
)
def test_a_turn_is_answered_message_by_message(body, rates, heard):
    _, blocks, wire = served(body, TURN, TURN, round=3)
    assert blocks.rates == rates and wire.heard == heard
    allowed = {Limits(rows=3 * ranks, tokens=7) for ranks in (RANKS[0], RANKS[2])}
    assert set(blocks.most) == allowed


@pytest.mark.parametrize("body", ["shared", "per_client"])
@pytest.mark.parametrize(
    ("turn", "number", "due"),
    [
        (("end",), 1, "hidden, lengths"),
        (("hidden lengths", "end"), 2, "output_gradient"),
        ((*STEP[:2], "end"), 3, "hidden, lengths"),
        ((*STEP, "end"), 5, "hidden, lengths"),
        ((*STEP, *STEP[:3], "end"), 8, "last, output_gradient"),
        ((*STEP, *STEP, "hidden lengths"), 9, "end"),
        (("hidden lengths", "output_gradient last"), 2, "output_gradient"),
        ((*STEP[:3], "output_gradient"), 4, "last, output_gradient"),
        (("hidden labels lengths",), 1, "hidden, lengths"),
    ],
)
def test_a_turn_that_is_not_the_runs_is_refused(body, turn, number, due):
    """It would leave graphs and gradients for the next client, or never end."""
    said = rf"participant of client 2: message {number} of a turn of 2 local steps .* should have {due}, and"
    with pytest.raises(FedSpeedError, match=said):
        served(body, TURN, turn)


@pytest.mark.parametrize(("body", "bad", "client"), [("shared", 11, 2), ("per_client", 4, 0)])
def test_what_is_not_finite_is_not_computed_with_and_all_clients_hear_of_it(body, bad, client):
    """Turns go on to their ends, since clients wait for answers and for each other."""
    method, blocks, wire = served(body, TURN, TURN, bad=bad)
    assert len(blocks.most) == bad + 1 and wire.messages == [[], []]
    assert sum(map(len, blocks.rates.values())) == {"shared": 2, "per_client": 0}[body]
    assert method.served_problem() == f"the participant of client {client}: a message is not finite"
    assert served(body, TURN, TURN)[0].served_problem() == ""


def test_participants_that_evaluate_are_answered_in_turn():
    """Each waits for a message of the others, not for their whole evaluations."""
    method = M2FedSA(variant_of("m2fedsa")(), Layout.of(STATE), clients=3, seed=0)
    batch = "hidden lengths"
    wire = Wire([batch, "end"], [batch, batch, batch, "end"])
    blocks = Body()
    method.serve_evaluation(blocks, wire, STATE, trainer=TRAINER)
    assert wire.heard == [0, 1, 0, 1, 1, 1]
    assert blocks.most == [Limits(rows=3 * ranks, tokens=7) for ranks in (2, 1, 1, 1)]


def test_a_server_takes_the_step_of_the_round_that_it_has_served():
    method, _, _ = served("shared", TURN, TURN, round=3)
    with pytest.raises(AssertionError, match="another round"):
        stepped(method, 4)
    assert stepped(method, 3) == STATE
    with pytest.raises(AssertionError, match="another round"):
        stepped(method, 3)
    assert stepped(method, 0) == STATE
    method, _, _ = served("per_client", TURN, TURN, round=3)
    with pytest.raises(AssertionError, match="sum comes before"):
        stepped(method, 3)
    with pytest.raises(AssertionError, match="another round"):
        method.aggregate(STATE, np.zeros(9, np.float32), 1.0, round=2)
