"""Whole rounds against plain PyTorch, and against each other however the clients lie on the ranks. Real
engines, processes, exchanges.
"""

import time
from itertools import product

import numpy as np
import pytest

from fedspeed.federation import pacing
from tests.federation import runs
from tests.federation.runs import (
    Notes,
    course,
    federation,
    largest,
    run_worlds,
    same_bits,
    settings,
    share_of,
)
from tests.limits import LIMIT_S
from tests.processes import Scenarios

APART = {0: (0,), 1: (1,), 2: (2,)}
METHODS = ("lora", "full")
HOLDING = {  # the ways in which a held tensor could move: momentum and decay of either optimizer, kept or not
    "freeze_a": {"train": {"weight_decay": 0.1}},
    "alternate": {"train": {"weight_decay": 0.1, "optimizer": "adamw", "momentum": 0.0, "lr": 0.01}},
    "alternate, kept": {"train": {"weight_decay": 0.1}, "local_optimizer": "keep"},
}


def one_step(base, method):
    return settings(
        base,
        train={"local_steps": 1, "micro_batch": 4, "momentum": 0.0, "lr": 0.5},
        adapter={"method": method},
        federation={"rounds": 1},
    )


def two_rounds(base, **train):
    return settings(base, train=train, federation={"rounds": 2})


def sampled(base):
    """One client a round, so that most ranks have nobody to train; evaluated at the end only."""
    return settings(base, federation={"rounds": 3, "clients_per_round": 1, "evaluate_every": 3})


MASKED = [("avg_factors", "fp32"), ("alternate", "fp32"), ("alternate", "fp16"), ("freeze_a", "bf16")]
LARGE_STEPS = {"local_steps": 1, "lr": 40.0, "momentum": 0.0}


def large_steps(base, rule, dtype, mode):
    """A first round that moves weights by far more than a second one could expect; then, under `alternate`,
    other weights.
    """
    return settings(
        base,
        dtype=dtype,
        train=LARGE_STEPS,
        routing={"mode": mode, "cell_kib": 64},
        federation={"rounds": 2, "method": {"name": "lora_average", "rule": rule}},
    )


def slowly_reported(base, stale):
    return settings(base, federation={"rounds": 3, "staleness": stale})


class SlowReporter(Notes):
    """Takes its time over a record, so that the other ranks are in the next round by then and wait."""

    def round(self, record):
        super().round(record)
        if record.round == 1:
            time.sleep(2.0)


def settled(base, kind, seed):
    """Everything about the server optimizer but its kind by default."""
    return settings(
        base,
        train={"local_steps": 1},
        adapter={"method": "full"},
        run={"seed": seed},
        federation={"rounds": 4, "server_optimizer": kind},
    )


def holding(base, case):
    options = dict(HOLDING[case])
    method = {"name": "lora_average", "rule": case.split(",")[0]}
    return settings(base, train=options.pop("train"), federation={"rounds": 2, "method": method, **options})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return runs.tiny_llama(tmp_path_factory.mktemp("base") / "llama")


# Three ranks, each a torch world of its own; the gloo exchange between them.


@pytest.fixture(scope="module")
def apart(base, tmp_path_factory):
    return run_worlds((1, 1, 1), ranks_apart, base, str(tmp_path_factory.mktemp("apart")))


def ranks_apart(world, base, folder):
    svd = settings(
        base,
        train={"optimizer": "adamw", "lr": 0.05},
        federation={"rounds": 1, "method": {"name": "flexlora"}},
    )
    out = Scenarios()
    for method in METHODS:
        out.play_together(world, method, course, method, one_step(base, method), APART, folder)
    out.play_together(world, "two rounds", course, "two", two_rounds(base), APART, folder)
    for case in HOLDING:
        out.play_together(world, case, course, case, holding(base, case), APART, folder)
    out.play_together(world, "svd", course, "svd", svd, APART, folder)
    for stale in (0, 1):
        out.play_together(
            world, f"slow reporter, {stale}", at_once, f"slow-{stale}", slowly_reported(base, stale), folder
        )
    for rule, dtype in MASKED:
        for mode in ("plain", "mask"):
            out.play_together(
                world,
                (rule, dtype, mode),
                course,
                f"{rule}-{dtype}-{mode}",
                large_steps(base, rule, dtype, mode),
                APART,
                folder,
            )
    if world.rank < 2:
        out.play("unequal", unequal_clusters, world, base, folder)
    # From here on every rank has work of its own.
    if world.rank == 0:
        from tests.federation import plain

        for method in METHODS:
            out.play(
                f"plain {method}",
                lambda method=method: plain.one_step_on_the_mean(
                    one_step(base, method), out[method].states[0]
                ),
            )
        out.play("plain two rounds", lambda: plain.fedavg(two_rounds(base), out["two rounds"].states[0]))
        out.play("plain alone", lambda: plain.alone(two_rounds(base), out["two rounds"].states[0]))
        out.play("on one rank", course, world, "one", two_rounds(base), {0: (0, 1, 2)}, folder)
        out.play(
            "in one pass", course, world, "in-one-pass", two_rounds(base), {0: (0, 1, 2)}, folder, kind="ram"
        )
        out.play("sampled", course, world, "sampled", sampled(base), {0: (0, 1, 2)}, folder)
    elif world.rank == 1:
        for case in product(("zero0", "zero2", "zero3"), KEPT, ("keep", "reset", "at once")):
            stage, optimizer, how = case
            out.play(case, kept, world, base, folder, stage, optimizer, how=how)
    else:
        for kind, seed in product(("adam", "yogi"), range(3)):
            out.play(
                (kind, seed),
                course,
                world,
                f"{kind}-{seed}",
                settled(base, kind, seed),
                {2: (0, 1, 2)},
                folder,
            )
        still = settings(base, clients=1, train={"lr": 0.0}, federation={"rounds": 9, "patience": 2})
        out.play("still", course, world, "still", still, {2: (0,)}, folder)
    return out


def at_once(world, name, config, folder):
    """Records of a run that nobody asks to stop."""
    notes = SlowReporter()
    with federation(world, name, config, APART, folder, notes=notes) as fed:
        fed.run(runs.begin(fed))
    return notes.records


@pytest.mark.parametrize("method", METHODS)
def test_one_step_each_is_one_step_on_the_weighted_mean_gradient(apart, method):
    (start, end) = apart[0][method].states
    expected = apart[0][f"plain {method}"]
    assert largest(end, expected) < 1e-6
    assert min(np.abs(end[n] - start[n]).max() for n in start) > 1e-4, (
        "every tensor must have moved by much more than the tolerance"
    )
    assert all(same_bits(rank[method].states[1], end) for rank in apart), (
        "no rank may know another global state"
    )


def test_rounds_are_plain_federated_averaging(apart):
    end = apart[0]["two rounds"].states[2]
    expected = apart[0]["plain two rounds"]
    assert largest(end, expected) < 1e-6
    assert largest(end, apart[0]["two rounds"].states[1]) > 1e-3


def test_svd_is_the_nearest_to_the_mean_of_the_products(apart):
    ends = [rank["svd"].turns[0] for rank in apart]
    shares = np.array([share_of(c) for c in range(3)]) / sum(share_of(c) for c in range(3))
    state = apart[0]["svd"].states[1]
    for a in (name for name in state if ".lora_A." in name):
        b = a.replace(".lora_A.", ".lora_B.")
        u, values, vt = np.linalg.svd(
            sum(share * end[b].astype(np.float64) @ end[a] for share, end in zip(shares, ends))
        )
        r = state[a].shape[0]
        np.testing.assert_allclose(state[b] @ state[a], (u[:, :r] * values[:r]) @ vt[:r], atol=1e-6)
        averaged = [
            sum(share * end[name].astype(np.float64) for share, end in zip(shares, ends)) for name in (b, a)
        ]
        assert np.abs(averaged[0] @ averaged[1] - state[b] @ state[a]).max() > 1e-3, (
            "or averaging the factors would do as well"
        )
    assert all(same_bits(rank["svd"].states[1], state) for rank in apart)


def test_records_of_the_rounds(apart):
    records = apart[0]["two rounds"].records
    assert [r.round for r in records] == [0, 1, 2] and not apart[1]["two rounds"].records
    assert (records[0].train_loss, records[0].tokens, records[0].clients) == (None, 0, 0) and records[
        0
    ].val_loss > 0
    for record in records[1:]:
        assert (record.clients, record.received, record.missing) == (3, 3, ())
        assert [c.local_steps for c in record.per_client] == [2, 2, 2]
        assert record.tokens == sum(c.tokens for c in record.per_client) > 0
        assert record.train_loss == pytest.approx(
            sum(c.train_loss * c.tokens for c in record.per_client) / record.tokens
        )
        assert 0 < record.factor_error < 1 and record.update_norm > 0
        assert 0 < record.compute_s < record.seconds
        words = (
            sum(t.size for t in apart[0]["two rounds"].states[0].values()) + 14 * 16
        )  # with the sketch of 14 matrices
        chunk = -(-words // 3)
        assert record.bytes_sent == 3 * (2 * 2 * chunk * 4 + 2 * 32), (
            "the update alone: two thirds of a vector twice, and a head"
        )


def test_stages_never_add_up_to_more_than_the_round(apart, together):
    """In any round of any run here, also where the others wait for a reporter that is still at the last
    record.
    """
    slow = [apart[0][f"slow reporter, {stale}"] for stale in (0, 1)]
    found = [
        record
        for seen in (apart, together)
        for out in seen[0].values()
        for record in getattr(out, "records", [])
    ]
    assert len(found) > 60 and [len(records) for records in slow] == [4, 4]
    for record in [*found, *slow[0], *slow[1]]:
        stages = record.compute_s + record.gather_s + record.exchange_s + record.idle_s
        assert 0 < stages <= record.seconds * (1 + 1e-9)
    assert slow[0][2].idle_s > 0.3 and slow[0][2].seconds > 2.0, (
        "what the reporter does between rounds belongs to one of them"
    )


def test_the_best_round_is_kept(apart):
    for case in ("lora", "two rounds", "freeze_a", "still"):
        seen = apart[2 if case == "still" else 0][case]
        losses = {r.round: r.val_loss for r in seen.records}
        assert seen.best_round == min(losses, key=losses.get), "the start is one of them"
        assert same_bits(seen.best, seen.states[seen.best_round])


# What is held stays what it was.


def moves(seen, number, carried=1):
    """Names that some turn of the round changed."""
    before = seen.states[number - 1]
    ends = seen.turns[(number - 1) * carried : number * carried]
    assert len(ends) == carried
    return {n for n in before for end in ends if before[n].tobytes() != end[n].tobytes()}


def held_as_it_should_be(seen, rule, carried=1):
    a_names, b_names = ({n for n in seen.states[0] if part in n} for part in (".lora_A.", ".lora_B."))
    first, second = (moves(seen, number, carried) for number in (1, 2))
    assert first == b_names, "round 1 trains all of B and nothing of A"
    assert second == (b_names if rule == "freeze_a" else a_names)
    for number, held in ((1, a_names), (2, a_names if rule == "freeze_a" else b_names)):
        before, after = seen.states[number - 1 : number + 1]
        assert all(before[n].tobytes() == after[n].tobytes() for n in held)
        assert all(before[n].tobytes() != after[n].tobytes() for n in set(before) - held)


@pytest.mark.parametrize("case", HOLDING)
def test_held_factors_keep_every_bit(apart, case):
    for rank in apart:
        held_as_it_should_be(rank[case], case.split(",")[0])
    assert all(r.factor_error < 1e-5 for r in apart[0][case].records[1:]), (
        "one factor is shared, so averaging is exact"
    )


# A masked sum is the plain one.


@pytest.mark.parametrize("rule, dtype", MASKED)
def test_masked_rounds_are_plain_rounds_from_the_first_one_on(apart, rule, dtype):
    """Within what fixed-point numbers round away. Nothing is clipped, and the error of averaging is as it is.

    The second round begins from weights that differ by that much, of which a 16-bit copy may fall to either
    side: in bf16 this moved 1.3 % of the change.
    """
    plain = apart[0][rule, dtype, "plain"]
    masked = apart[0][rule, dtype, "mask"]
    for number, least, tolerance in (
        (1, 1, 1e-4),
        (2, 0.1, {"fp32": 1e-4, "fp16": 5e-3, "bf16": 3e-2}[dtype]),
    ):
        change = largest(plain.states[number], plain.states[number - 1])
        assert change > least and largest(masked.states[number], plain.states[number]) < tolerance * change
        clear = plain.records[number]
        hidden = masked.records[number]
        assert hidden.clipped == 0 and hidden.val_loss == pytest.approx(clear.val_loss, rel=1e-3)
        assert hidden.factor_error == pytest.approx(clear.factor_error, rel=1e-2, abs=1e-6)


# The state of local optimizers between rounds.

KEPT = {
    "sgd": {"lr": 0.1, "schedule": "linear"},
    "adamw": {"optimizer": "adamw", "momentum": 0.0, "lr": 0.01, "schedule": "cosine"},
}


def kept(world, base, folder, kind, optimizer, *, how):
    """Four local steps of a single client: in four rounds that keep or reset the optimizer, or in one round;
    one learning-rate schedule.
    """
    steps, rounds = (4, 1) if how == "at once" else (1, 4)
    config = settings(
        base,
        clients=1,
        train={**KEPT[optimizer], "local_steps": steps},
        federation={"rounds": rounds, "local_optimizer": "reset" if how == "reset" else "keep"},
    )
    return course(world, f"{kind}-{optimizer}-{how}", config, carries={1: (0,)}, folder=folder, kind=kind)


@pytest.mark.parametrize("optimizer", KEPT)
@pytest.mark.parametrize("kind", ["zero0", "zero2", "zero3"])
def test_a_kept_optimizer_goes_on_where_it_was(apart, kind, optimizer):
    keep, reset, at_once = (apart[1][kind, optimizer, how] for how in ("keep", "reset", "at once"))
    assert same_bits(keep.turns[0], reset.turns[0])
    assert largest(keep.turns[1], reset.turns[1]) > 1e-4, "already the second round's first step differs"
    assert largest(keep.states[-1], at_once.states[-1]) < 1e-6, (
        "rounds of one client are no different from one long round"
    )


# Clusters that take different numbers of steps.


class Events:
    """Lines that several processes append to one file."""

    def __init__(self, path):
        self.path = path

    def note(self, text):
        with open(self.path, "ab", buffering=0) as file:
            file.write(f"{text}\n".encode())

    def seen(self):
        return self.path.read_text().splitlines() if self.path.exists() else []


class Watched:
    """An exchange that notes when this rank brings its update."""

    def __init__(self, exchange, note):
        self._exchange = exchange
        self._note = note

    def __getattr__(self, name):
        return getattr(self._exchange, name)

    def start(self, vector, weight, parts=None):
        if weight:
            self._note()
        return self._exchange.start(vector, weight, parts)


class SlowNotes(Notes):
    """Takes the last step of a round only once the fast cluster has brought its update: ranks that waited for
    each other would hang.
    """

    def __init__(self, events):
        super().__init__()
        self._events = events

    def step(self, round_number, local_step, local_steps, loss=None):
        super().step(round_number, local_step, local_steps, loss)
        self._events.note(f"slow step {local_step} of round {round_number}")
        end = time.monotonic() + LIMIT_S
        while local_step == local_steps - 1 and self._events.seen().count("fast update") < round_number:
            assert time.monotonic() < end, f"the fast cluster brought no update in round {round_number}"
            time.sleep(0.01)


def unequal_clusters(world, base, folder):
    from pathlib import Path

    events = Events(Path(folder) / "events")
    config = settings(
        base,
        clients=2,
        train={"local_steps": 1, "local_steps_by_cluster": {"cluster1": 3}},
        federation={"rounds": 2},
    )
    who, notes = ("fast", Notes()) if world.cluster == 0 else ("slow", SlowNotes(events))
    seen = course(
        world,
        "unequal",
        config,
        {0: (0,), 1: (1,)},
        folder,
        notes=notes,
        watch=lambda exchange: Watched(exchange, lambda: events.note(f"{who} update")),
    )
    return seen, events.seen()


def test_clusters_do_not_wait_for_each_other_inside_a_round(apart):
    (fast, events) = apart[0]["unequal"]
    (slow, _) = apart[1]["unequal"]
    assert [[c.local_steps for c in r.per_client] for r in fast.records] == [[0, 0], [1, 3], [1, 3]]
    assert events[: events.index("slow update") + 1].count("fast update") == 1
    order = [
        e
        for e in events
        if e in ("fast update", "slow update", "slow step 3 of round 1", "slow step 3 of round 2")
    ]
    assert order == [
        "fast update",
        "slow step 3 of round 1",
        "slow update",
        "fast update",
        "slow step 3 of round 2",
        "slow update",
    ]
    assert same_bits(fast.states[2], slow.states[2])


# The end of a run.


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["adam", "yogi"])
def test_adaptive_server_optimizers_do_not_diverge_by_default(apart, kind, seed):
    losses = [r.val_loss for r in apart[2][kind, seed].records]
    assert max(losses) < losses[0] + 0.1, "with a step size of 1.0 they end above 5"


def test_a_run_that_does_not_get_better_stops(apart):
    still = apart[2]["still"]
    assert still.done == "early stop"
    assert [r.round for r in still.records] == [0, 1, 2], "two evaluations do not beat the start"
    assert (
        len({r.val_loss for r in still.records}) == 1
        and still.best_round == 0
        and same_bits(still.best, still.states[0])
    )


# Three ranks in one torch world that share the base at ZeRO-3.


@pytest.fixture(scope="module")
def together(base, tmp_path_factory):
    return run_worlds((3,), ranks_together, base, str(tmp_path_factory.mktemp("together")))


def ranks_together(world, base, folder):
    out = Scenarios()
    for kind, method in product(("zero0", "zero3"), METHODS):
        out.play_together(
            world,
            (kind, method),
            course,
            f"{kind}-{method}",
            one_step(base, method),
            APART,
            folder,
            kind=kind,
        )
    out.play_together(world, "two rounds", course, "two", two_rounds(base), APART, folder, kind="zero3")
    for kind, case in product(("zero2", "zero3"), HOLDING):
        out.play_together(
            world, (kind, case), course, f"{kind}-{case}", holding(base, case), APART, folder, kind=kind
        )
    return out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["zero0", "zero3"])
def test_one_step_in_a_shared_cluster_is_the_same_step(apart, together, kind, method):
    (start, end) = together[0][kind, method].states
    (begun, expected) = (apart[0][method].states[0], apart[0][f"plain {method}"])
    assert same_bits(start, begun)
    assert largest(end, expected) < 1e-6
    assert all(same_bits(rank[kind, method].states[1], end) for rank in together)


@pytest.mark.parametrize("case", HOLDING)
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_held_factors_keep_every_bit_in_partitions(together, kind, case):
    for rank in together:
        held_as_it_should_be(rank[kind, case], case.split(",")[0])


# The same three clients on other numbers of ranks.


@pytest.fixture(scope="module")
def pair(base, tmp_path_factory):
    return run_worlds((2,), ranks_in_a_pair, base, str(tmp_path_factory.mktemp("pair")))


SHARED = {0: (0, 2), 1: (1,)}  # rank 1 idles through half of every round
BOTH = {0: (0, 1, 2), 1: (0, 1, 2)}  # every client has two ranks


def ranks_in_a_pair(world, base, folder):
    out = Scenarios()
    counted = ended_work()
    for kind in ("zero0", "zero3", "cluster"):
        out.play_together(
            world, ("shared", kind), course, f"shared-{kind}", two_rounds(base), SHARED, folder, kind=kind
        )
    for kind in ("zero0", "zero2", "zero3", "client", "cluster"):
        out.play_together(
            world,
            ("both", kind),
            course,
            f"both-{kind}",
            two_rounds(base, micro_batch=1),
            BOTH,
            folder,
            kind=kind,
        )
    for kind in ("zero3", "cluster"):
        out.play_together(
            world, ("sampled", kind), course, f"sampled-{kind}", sampled(base), SHARED, folder, kind=kind
        )
        out.play_together(world, ("compared", kind), compared, base, folder, kind)
    out.play_together(
        world,
        ("both", "held"),
        course,
        "both-held",
        holding(base, "alternate, kept"),
        BOTH,
        folder,
        kind="zero3",
    )
    out.play("counted", list, counted)
    return out


def ended_work():
    """A list that every piece of work joins as it ends: (name, unit, total, done)."""
    from contextlib import contextmanager

    from fedspeed import activity

    during = activity.during
    ended = []

    @contextmanager
    def watched(*args, **options):
        with during(*args, **options):
            work = activity.current()
            yield
            ended.append((work.name, work.unit, work.total, work.done))

    activity.during = watched
    return ended


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("the evaluation before round 1", "batch"),
        ("the evaluation after round 2", "batch"),
        ("round 2", "local step"),
        ("the evaluation of each client alone", "batch"),
        ("the training of each client alone", "local step"),
        ("the loading of the base", "part"),
    ],
)
def test_all_work_that_takes_long_is_counted_to_its_end(pair, name, unit):
    """Under each way of execution, so that what is shown of it moves, and reaches its end."""
    for rank in pair:
        found = [work for work in rank["counted"] if work[0] == name]
        assert found and all(work[1] == unit and 0 < work[2] == pytest.approx(work[3]) for work in found), (
            found
        )


@pytest.mark.parametrize(
    "where",
    [
        "on one rank",
        "in one pass",
        "shared zero0",
        "shared zero3",
        "shared cluster",
        "both zero0",
        "both zero2",
        "both zero3",
        "both client",
        "both cluster",
        "together",
    ],
)
def test_where_the_clients_lie_changes_nothing(apart, together, pair, where):
    reference = apart[0]["two rounds"]
    if where in ("on one rank", "in one pass"):
        ranks = [apart[0][where]]
    elif where == "together":
        ranks = [rank["two rounds"] for rank in together]
    else:
        ranks = [rank[tuple(where.split())] for rank in pair]
    assert same_bits(ranks[0].states[0], reference.states[0])
    assert largest(ranks[0].states[2], reference.states[2]) < 1e-6
    assert all(same_bits(rank.states[2], ranks[0].states[2]) for rank in ranks)
    for record, expected in zip(ranks[0].records, reference.records, strict=True):
        assert (record.received, record.tokens) == (expected.received, expected.tokens)
        assert [c.local_steps for c in record.per_client] == [c.local_steps for c in expected.per_client]
        assert record.val_loss == pytest.approx(expected.val_loss, abs=1e-6)
        assert record.train_loss == pytest.approx(expected.train_loss, abs=1e-6)


@pytest.mark.parametrize("kind", ["zero3", "cluster"])
def test_ranks_without_a_client_to_train_keep_step(apart, pair, kind):
    reference = apart[0]["sampled"]
    seen = pair[0]["sampled", kind]
    asked = [{c.client for c in r.per_client if c.local_steps} for r in reference.records[1:]]
    assert [len(a) for a in asked] == [1, 1, 1] and len(set.union(*asked)) > 1
    assert [{c.client for c in r.per_client if c.local_steps} for r in seen.records[1:]] == asked
    assert [(r.clients, r.received, r.val_loss is None) for r in seen.records[1:]] == [
        (1, 1, True),
        (1, 1, True),
        (1, 1, False),
    ]
    assert largest(seen.states[3], reference.states[3]) < 1e-6
    assert same_bits(pair[0]["sampled", kind].states[3], pair[1]["sampled", kind].states[3])


def compared(world, base, folder, kind):
    from fedspeed.evaluation.compare import compare

    with federation(
        world, f"compared-{kind}", two_rounds(base), carries=SHARED, folder=folder, kind=kind
    ) as fed:
        progress = runs.begin(fed)
        start = progress.state
        end = fed.run(progress)
        everyone = [runs.client_data(c) for c in range(3)]
        return compare(fed.parts, end, start=start, everyone=everyone)


@pytest.mark.parametrize("kind", ["zero3", "cluster"])
def test_clients_alone_are_compared_with_the_federated_model(apart, pair, kind):
    assert pair[0]["compared", kind] == pair[1]["compared", kind]
    scores = {s.name: s.held_out_loss for s in pair[0]["compared", kind]}
    records = apart[0]["two rounds"].records
    assert list(scores) == ["before", "client 0 alone", "client 1 alone", "client 2 alone", "federated"]
    assert scores["before"] == pytest.approx(records[0].val_loss, abs=1e-6)
    assert scores["federated"] == pytest.approx(records[2].val_loss, abs=1e-6)
    for client, expected in enumerate(apart[0]["plain alone"]):
        assert scores[f"client {client} alone"] == pytest.approx(expected, abs=2e-6)
    assert np.diff(sorted(scores.values())).min() > 1e-5, "the five must differ by more than the tolerance"


def test_held_factors_keep_every_bit_on_both_ranks_of_a_client(pair):
    for rank in pair:
        held_as_it_should_be(rank["both", "held"], "alternate", carried=3)


@pytest.fixture(scope="module")
def uneven(base, tmp_path_factory):
    return run_worlds((2,), uneven_evaluation, base, str(tmp_path_factory.mktemp("uneven")))


def uneven_evaluation(world, base, folder):
    return {
        part: course(
            world,
            part,
            two_rounds(base, micro_batch=1),
            carries=BOTH,
            folder=folder,
            kind="zero3",
            base_partition=part,
        )
        for part in ("client", "rank")
    }


@pytest.mark.parametrize("part", ["client", "rank"])
def test_held_out_rows_need_not_divide_by_the_ranks_of_a_client(apart, uneven, part):
    """Three rows over two ranks: one has nothing left to evaluate while the other gathers."""
    assert largest(uneven[0][part].states[2], apart[0]["two rounds"].states[2]) < 1e-6
    assert uneven[0][part].records[2].val_loss == pytest.approx(
        apart[0]["two rounds"].records[2].val_loss, abs=1e-6
    )


# A client whose weights are no numbers any more.


class Diverging(Notes):
    """Makes this rank's client end round 1 with NaN."""

    def step(self, round_number, local_step, local_steps, loss=None):
        if round_number == 1 and local_step == local_steps:
            self.engine.load({n: t.detach() * float("nan") for n, t in self.engine.state().items()})
        super().step(round_number, local_step, local_steps, loss)


@pytest.fixture(scope="module")
def diverged(base, tmp_path_factory):
    return run_worlds((2,), diverging, base, str(tmp_path_factory.mktemp("diverged")))


def diverging(world, base, folder):
    from fedspeed.federation.keeping import Progress

    carries = {0: (0, 2), 1: (1,)}
    seen = course(
        world,
        "diverging",
        two_rounds(base),
        carries=carries,
        folder=folder,
        kind="zero3",
        notes=Diverging() if world.rank == 1 else None,
    )
    with federation(world, "sound", two_rounds(base), carries=carries, folder=folder, kind="zero3") as fed:
        expected = fed.run(Progress(1, seen.states[1], {})).state
    return seen, expected


def test_an_update_that_is_no_number_is_left_out_and_reported(diverged):
    seen = diverged[0][0]
    assert [(r.clients, r.received, r.missing) for r in seen.records[1:]] == [(3, 2, (1,)), (3, 3, ())]
    ends = dict(zip((0, 2), seen.turns))
    whole = sum(share_of(c) for c in ends)
    for name, tensor in seen.states[1].items():
        expected = sum(share_of(c) / whole * end[name].astype(np.float64) for c, end in ends.items())
        np.testing.assert_allclose(tensor, expected, rtol=0, atol=1e-6)


def test_a_client_that_diverged_is_whole_again_in_the_next_round(diverged):
    """Nothing of it may stay behind: optimizer state, gradients of the passes it idled through, a step left
    out.
    """
    for seen, expected in diverged:
        assert same_bits(seen.states[2], expected)


# Rounds in which clients take different numbers of steps.


class StepClock:
    """A clock that only local steps move on: what a rank does in a round of seconds must not depend on how
    busy this machine is.
    """

    def __init__(self, step_s: float):
        self._now = 0.0
        self._step_s = step_s

    def perf_counter(self) -> float:
        return self._now

    def timed(self, train_step):
        """The same local step, which takes its time by this clock."""

        def step(*work):
            self._now += self._step_s
            return train_step(*work)

        return step


def unlike_steps(world, base, folder, budget):
    config = settings(
        base,
        clients=2,
        train={
            "local_steps": 8,
            "momentum": 0.0,
            "lr": 0.01,
            **({} if budget else {"local_steps_by_cluster": {"cluster1": 2}}),
        },
        federation={
            "rounds": 4 if budget else 1,
            **({"round_budget": "seconds", "round_seconds": 0.6} if budget else {}),
        },
    )
    notes = Notes()
    clock = StepClock(0.125 if world.cluster else 0.25)
    with (
        federation(world, f"uneven{budget}", config, {0: (0,), 1: (1,)}, folder, notes=notes) as fed,
        pytest.MonkeyPatch.context() as patch,
    ):
        if budget:
            patch.setattr(pacing, "time", clock)
            patch.setattr(fed.engine, "step", clock.timed(fed.engine.step))
        first = runs.begin(fed)
        start = dict(first.state)
        end = fed.run(first).state
    return start, end, notes.records


def test_clients_count_by_their_rows_however_many_steps_they_take(tmp_path):
    """Against FedNova by hand: the mean change of a step, times the mean number of steps."""
    base = runs.tiny_llama(tmp_path / "llama")
    (start, end, _), _ = run_worlds((1, 1), unlike_steps, base, str(tmp_path), 0)
    expected = run_worlds((1,), by_hand, base, start)[0]
    assert largest(end, expected) < 1e-5 < largest(end, start) / 100


def by_hand(world, base, start):
    from tests.federation.plain import Plain

    config = settings(base, clients=2, train={"local_steps": 8, "momentum": 0.0, "lr": 0.01})
    plain = Plain(config)
    shares = [share_of(c) / (share_of(0) + share_of(1)) for c in (0, 1)]
    steps = (8, 2)
    mean = {n: np.zeros(t.shape) for n, t in start.items()}
    for client in (0, 1):
        plain.load(start)
        plain.local_steps(client, 0, steps[client])
        for name, tensor in plain.state().items():
            mean[name] += shares[client] / steps[client] * (tensor.astype(np.float64) - start[name])
    return {
        n: (start[n] + sum(p * k for p, k in zip(shares, steps)) * mean[n]).astype(np.float32) for n in start
    }


def test_a_budget_of_seconds_lets_the_fast_take_more_steps(tmp_path):
    (_, end, records), (_, other, _) = run_worlds(
        (1, 1), unlike_steps, runs.tiny_llama(tmp_path / "llama"), str(tmp_path), 1
    )
    taken = [[client.local_steps for client in record.per_client] for record in records[1:]]
    assert taken == [[2, 2], [2, 4], [2, 4], [2, 4]]  # at first nobody knows how long a step takes
    assert same_bits(end, other)
