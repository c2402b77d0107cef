"""Whole rounds against plain PyTorch, and against each other however clients are placed on ranks. Real
engines, processes and exchanges; what is played is in scenarios.py.
"""

import numpy as np
import pytest

from tests.federation import runs
from tests.federation.runs import largest, run_worlds, same_bits, share_of
from tests.federation.scenarios import (
    FREEZING,
    KEPT,
    MASKED,
    METHODS,
    ranks_apart,
    ranks_in_a_pair,
    ranks_together,
    uneven_evaluation,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return runs.tiny_llama(tmp_path_factory.mktemp("base") / "llama")


# Three ranks, each a torch world of its own; the gloo exchange between them.


@pytest.fixture(scope="module")
def apart(base, tmp_path_factory):
    return run_worlds((1, 1, 1), ranks_apart, base, str(tmp_path_factory.mktemp("apart")))


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
    for case in ("lora", "two rounds", "freeze_a", "constant"):
        seen = apart[2 if case == "constant" else 0][case]
        losses = {r.round: r.val_loss for r in seen.records}
        assert seen.best_round == min(losses, key=losses.get), "the start is one of them"
        assert same_bits(seen.best, seen.states[seen.best_round])


# Frozen arrays stay unchanged.


def moves(seen, number, carried=1):
    """Names that some turn of the round changed."""
    before = seen.states[number - 1]
    ends = seen.turns[(number - 1) * carried : number * carried]
    assert len(ends) == carried
    return {n for n in before for end in ends if before[n].tobytes() != end[n].tobytes()}


def check_frozen(seen, rule, carried=1):
    a_names, b_names = ({n for n in seen.states[0] if part in n} for part in (".lora_A.", ".lora_B."))
    first, second = (moves(seen, number, carried) for number in (1, 2))
    assert first == b_names, "round 1 trains all of B and nothing of A"
    assert second == (b_names if rule == "freeze_a" else a_names)
    for number, frozen in ((1, a_names), (2, a_names if rule == "freeze_a" else b_names)):
        before, after = seen.states[number - 1 : number + 1]
        assert all(before[n].tobytes() == after[n].tobytes() for n in frozen)
        assert all(before[n].tobytes() != after[n].tobytes() for n in set(before) - frozen)


@pytest.mark.parametrize("case", FREEZING)
def test_frozen_factors_keep_every_bit(apart, case):
    for rank in apart:
        check_frozen(rank[case], case.split(",")[0])
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


@pytest.mark.parametrize("optimizer", KEPT)
@pytest.mark.parametrize("kind", ["zero0", "zero2", "zero3"])
def test_a_kept_optimizer_goes_on_where_it_was(apart, kind, optimizer):
    keep, reset, uninterrupted = (apart[1][kind, optimizer, how] for how in ("keep", "reset", "one round"))
    assert same_bits(keep.turns[0], reset.turns[0])
    assert largest(keep.turns[1], reset.turns[1]) > 1e-4, "already the second round's first step differs"
    assert largest(keep.states[-1], uninterrupted.states[-1]) < 1e-6, (
        "rounds of one client are no different from one long round"
    )


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
    constant = apart[2]["constant"]
    assert constant.done == "early stop"
    assert [r.round for r in constant.records] == [0, 1, 2], "two evaluations do not beat the start"
    assert (
        len({r.val_loss for r in constant.records}) == 1
        and constant.best_round == 0
        and same_bits(constant.best, constant.states[0])
    )


# Three ranks in one torch world that share the base at ZeRO-3.


@pytest.fixture(scope="module")
def together(base, tmp_path_factory):
    return run_worlds((3,), ranks_together, base, str(tmp_path_factory.mktemp("together")))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["zero0", "zero3"])
def test_one_step_in_a_shared_cluster_is_the_same_step(apart, together, kind, method):
    (start, end) = together[0][kind, method].states
    expected = apart[0][f"plain {method}"]
    assert same_bits(start, apart[0][method].states[0])
    assert largest(end, expected) < 1e-6
    assert all(same_bits(rank[kind, method].states[1], end) for rank in together)


@pytest.mark.parametrize("case", FREEZING)
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_frozen_factors_keep_every_bit_in_partitions(together, kind, case):
    for rank in together:
        check_frozen(rank[kind, case], case.split(",")[0])


# The same three clients on other numbers of ranks.


@pytest.fixture(scope="module")
def pair(base, tmp_path_factory):
    return run_worlds((2,), ranks_in_a_pair, base, str(tmp_path_factory.mktemp("pair")))


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


def test_frozen_factors_keep_every_bit_on_both_ranks_of_a_client(pair):
    for rank in pair:
        check_frozen(rank["both", "frozen"], "alternate", carried=3)


@pytest.fixture(scope="module")
def uneven(base, tmp_path_factory):
    return run_worlds((2,), uneven_evaluation, base, str(tmp_path_factory.mktemp("uneven")))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["client", "rank"])
def test_held_out_rows_need_not_divide_by_the_ranks_of_a_client(apart, uneven, part):
    """Three rows over two ranks: one has nothing left to evaluate while the other gathers."""
    assert largest(uneven[0][part].states[2], apart[0]["two rounds"].states[2]) < 1e-6
    assert uneven[0][part].records[2].val_loss == pytest.approx(
        apart[0]["two rounds"].records[2].val_loss, abs=1e-6
    )
