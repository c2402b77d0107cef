"""What the protocol has for other methods: models of clients' own, an exchange in every step, a server."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from fedspeed.errors import FedSpeedError
from fedspeed.federation.methods.config import METHODS, Entry, variant_of
from tests.federation.runs import (
    Notes,
    begin,
    client_data,
    federation,
    run_worlds,
    same_bits,
    settings,
    tiny_llama,
)
from tests.processes import Scenarios

CLIENTS = (0, 1, 2)
ALONE = {0: CLIENTS}
LR = 0.2


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    base = tiny_llama(tmp_path_factory.mktemp("base") / "llama")
    return run_worlds((1,), all_runs, base, str(tmp_path_factory.mktemp("others")))[0]


def all_runs(world, base, folder):
    METHODS["every_step"] = Entry(module="tests.federation.methods.every_step")
    out = Scenarios()
    out.play(
        "plain, three rounds",
        whole,
        world,
        "plain 3",
        configured(base, "lora_average", rounds=3, local_steps=1),
        folder=folder,
    )
    out.play(
        "every step",
        whole,
        world,
        "every step",
        configured(base, "every_step", rounds=1, local_steps=3),
        folder=folder,
    )
    out.play("compared", compared, world, base, folder)
    return out


def configured(base, method, *, rounds, local_steps):
    config = settings(
        base, train={"momentum": 0.0, "lr": LR, "local_steps": local_steps}, federation={"rounds": rounds}
    )
    return replace(config, federation=replace(config.federation, method=variant_of(method)()))


def whole(world, name, config, folder):
    """What a run of all rounds comes to, on one rank that carries all clients."""
    notes = Notes()
    with federation(world, name, config, ALONE, folder, notes=notes) as fed:
        first = begin(fed)
        start = dict(first.state)
        end = fed.run(first)
    return SimpleNamespace(
        start=start, end=end.state, turns=notes.turns, records=notes.records, steps=notes.steps
    )


def compared(world, base, folder):
    """(comparison with each client alone, by name, and held-out loss of the last round) of a method in which
    clients have models of their own.
    """
    from fedspeed.evaluation.compare import compare

    config = configured(base, "fedsa", rounds=2, local_steps=1)
    notes = Notes()
    with federation(world, "compared", config, ALONE, folder, notes=notes) as fed:
        first = begin(fed)
        start = dict(first.state)
        scores = compare(
            fed.parts, fed.run(first), start=start, client_data=[client_data(client) for client in CLIENTS]
        )
    return {score.name: score.held_out_loss for score in scores}, notes.records[-1].val_loss


def test_an_exchange_in_every_step_is_as_many_rounds_of_one_step(seen):
    often = seen["every step"]
    reference = seen["plain, three rounds"]
    assert same_bits(often.end, reference.end)
    assert often.steps == [(1, step, 3) for step in (1, 2, 3) for _ in CLIENTS]
    (record,) = often.records[1:]
    others = reference.records[1:]
    assert (record.clients, record.received, [c.local_steps for c in record.per_client]) == (3, 3, [3, 3, 3])
    assert record.tokens == sum(other.tokens for other in others)
    assert record.val_loss == others[-1].val_loss, "evaluated once, in the end"
    assert record.update_norm == pytest.approx(
        np.sqrt(sum(np.sum((often.end[n] - t) ** 2.0) for n, t in often.start.items())), rel=1e-5
    )


def test_each_client_alone_is_compared_with_what_the_rounds_evaluate(seen):
    """Which is a model of each client's own here, and not what is common to them."""
    losses, of_the_last_round = seen["compared"]
    assert list(losses) == ["before", *(f"client {client} alone" for client in CLIENTS), "federated"]
    assert losses["federated"] == pytest.approx(of_the_last_round, rel=1e-6)
    assert len(set(losses.values())) == len(losses)


class Told:
    """The link of a rank, with what others send."""

    def __init__(self, *others):
        self.others = list(others)

    def share(self, vector, priority):
        return vector if priority or not self.others else self.others.pop(0)

    def any_of_client(self, found):
        return found


class Wire:
    """The exchange of a participant; what is gathered of all is made up."""

    def __init__(self, change=lambda row: row):
        self.change = change

    def gather(self, mine):
        return np.stack([mine, self.change(mine.copy())])


def served(server, link, witness=None, value=None, *, name="fedbiot", problem=""):
    """Take a server's step.

    Args:
        name: of the method that the configuration says. problem: of what was served.
    """
    from fedspeed.federation.methods.lora_average.method import LoraAverage
    from fedspeed.federation.server_step import server_stepped

    class Served(LoraAverage):
        def served_problem(self):
            return problem

        def server_step(self, state, engine, public_rows, *, round, exchange, trainer):
            assert (round, exchange, trainer) == (3, 0, "the server's")
            return {
                name: array + (len(public_rows) if value is None else value) for name, array in state.items()
            }

    state = {"a": np.zeros((1, 2), np.float32), "b": np.ones(1, np.float32)}
    method = Served(variant_of("lora_average")(), None, clients=2, seed=0)
    role = SimpleNamespace(server=server, public_rows=["row"] * 5)
    chosen = SimpleNamespace(federation=SimpleNamespace(method=SimpleNamespace(name=name)))
    parts = SimpleNamespace(
        method=method,
        role=role,
        engine=None,
        link=link,
        config=chosen,
        witness=witness,
        trainer="the server's",
    )
    return server_stepped(parts, state, round=3)


def witness(key, keys, wire):
    from fedspeed.routing.signed_broadcast import SignedBroadcast

    return SignedBroadcast(wire, key, keys, b"this run", speaker=0, names=["the server", "client 0"])


STEPPED = np.array([5, 5, 6], np.float32)


def test_what_the_server_makes_of_a_state_is_sent_to_all():
    mine = served(True, Told())
    assert {n: t.tolist() for n, t in mine.items()} == {"a": [[5, 5]], "b": [6]}
    others = served(False, Told(STEPPED, np.zeros(64, np.uint8)))
    assert {n: t.tolist() for n, t in others.items()} == {"a": [[5, 5]], "b": [6]}


def test_what_the_server_has_not_signed_or_not_sent_to_all_is_refused():
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from fedspeed.routing.anonymous.crypto import public_bytes

    def another(row):
        row[0] ^= 1
        return row

    server = Ed25519PrivateKey.generate()
    client = Ed25519PrivateKey.generate()
    keys = [public_bytes(server), public_bytes(client)]
    about = "the server's step in round 3, exchange 0"
    good = witness(server, keys, Wire())
    signature = good.sign(about, STEPPED)
    assert (
        served(True, Told(), good)["b"]
        == [6]
        == served(False, Told(STEPPED, signature), witness(client, keys, Wire()))["b"]
    )
    with pytest.raises(
        FedSpeedError,
        match="round 3, exchange 0: what the server sent is not the same for all: client 0 received another",
    ):
        served(True, Told(), witness(server, keys, Wire(another)))
    for said, signed in [
        (STEPPED + 1, signature),
        (STEPPED, good.sign("another round", STEPPED)),
        (STEPPED, witness(client, keys, Wire()).sign(about, STEPPED)),
    ]:
        with pytest.raises(FedSpeedError, match="the server, client 0 received one that it has not signed"):
            served(False, Told(said, signed), witness(client, keys, Wire()))


def test_a_result_that_is_not_finite_is_refused():
    said = "step in round 3, exchange 0: its result is not finite; "
    with pytest.raises(FedSpeedError, match=f"{said}look at federation.public_rows, or lower train.lr$"):
        served(True, Told(), value=np.nan)
    with pytest.raises(FedSpeedError, match=f"{said}lower train.lr$"):  # it reads no public rows
        served(True, Told(), value=np.nan, name="m2fedsa")


def test_what_a_server_refuses_ends_the_run_on_all_ranks():
    with pytest.raises(FedSpeedError, match="does not take place: client 1 is too loud"):
        served(True, Told(), problem="client 1 is too loud")
    text = np.frombuffer(b"client 1 is too loud".ljust(1024, b"\0"), np.uint8)
    result = np.full(3, np.nan, np.float32)
    with pytest.raises(FedSpeedError, match="round 3, .* does not take place: client 1 is too loud"):
        served(False, Told(result, np.zeros(64, np.uint8), text))


def test_a_method_with_a_server_that_is_not_there_is_refused():
    with pytest.raises(FedSpeedError, match="fedbiot has a server, and no rank is one; .*role=server"):
        served(False, Told(None))
