"""The list of metrics: it cannot contradict itself, and ledger, records and visibility follow from it."""

import math
import re
from types import SimpleNamespace

import pytest

from fedspeed.federation.ledger import Ledger
from fedspeed.monitor.metrics import registry
from fedspeed.monitor.metrics.metric import LOSSES, NOTHING, WEIGHTS, Metric
from fedspeed.monitor.round_record import round_record
from fedspeed.monitor.visibility import visible

METRICS = registry.METRICS
SUM = {"name": "x", "unit": "count", "per": "rank", "reduce": "sum"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"unit": "furlongs"}, "unit is 'furlongs', but must be one of loss, "),
        ({"per": "client", "reduce": "max"}, "per='client' cannot be reduced by 'max'"),
        ({"per": "round"}, "per='round' cannot be reduced by 'sum'"),
        ({"reduce": "ratio"}, "a ratio has a denominator"),
        ({"over": "y"}, "a ratio has a denominator"),
        ({"record": "both"}, "only a client's metric"),
        ({"reduce": "max", "shown_masked": True}, "masked modes never show a maximum"),
        ({"reveals": frozenset({"loss"})}, "reveals ['loss'], but can reveal ['losses', "),
        ({"per": "client", "record": "client", "shown_masked": True}, "never show a client's own value"),
        ({"always": True}, "masked modes have too"),
        ({"per": "client", "measure": float}, "only a rank can measure"),
    ],
)
def test_a_metric_that_contradicts_itself_is_refused(changes, told):
    Metric(**SUM)
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        Metric(**SUM | changes)
    assert "metric 'x'" in str(caught.value)


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        ([{}, {"tag": "t"}], "the name of a metric of a round is given twice: x"),
        ([{"tag": "t"}, {"name": "y", "tag": "t"}], "the tag of a metric of a round is given twice: t"),
        ([{"name": "missing"}], "may not be called missing"),
        (
            [{"name": "r", "per": "round", "reduce": "ratio", "of": "x", "over": "y"}, {}, {"name": "y"}],
            "'r' divides x by y",
        ),
    ],
)
def test_a_list_that_contradicts_itself_is_refused(monkeypatch, metrics, told):
    module = type("Module", (), {"METRICS": tuple(Metric(**SUM | changes) for changes in metrics)})
    monkeypatch.setattr(registry, "import_module", lambda name: module)
    with pytest.raises(ValueError, match=told):
        registry.collected(["added"])


def filled(make_ledger, added=()):
    """Return the sum of the ledgers of two ranks with one client each, with the additional values `added`:
    (slot, value, client or rank).
    """
    whole = make_ledger()
    for place, wall_s in enumerate((8.0, 12.0)):
        own = make_ledger()
        own.add_client(
            place,
            asked=1,
            received=1 - place,
            train_loss=6.0,
            tokens=4 * (place + 1),
            val_loss=5.0,
            val_tokens=10,
            exact=place,
            rows=4,
            steps=3,
            compute_s=2.0,
            gather_s=1.0,
            exchange_s=0.5,
            idle_s=0.25,
            bytes_sent=100,
            peak_bytes=1000,
            device_bytes=500,
        )
        own.set_rank(
            place,
            ranks=1,
            wall_s=wall_s,
            compute_s=3.0,
            gather_s=1.0,
            exchange_s=0.5,
            idle_s=0.5,
            bytes_sent=100 + place,
            peak_bytes=1000 * (1 + place),
            device_bytes=50,
            loaded_bytes=7,
            step_s=0.5 + place,
            bubble_s=1.0,
            passes_s=4.0,
            exchanged_s=4.0,
            waited_s=1.0 + place,
            clip_updates=2.0,
            clip_shortened=place,
            clip_norms=3.0,
        )
        for slot, value, per in added:
            (own.add_client if per == "client" else own.set_rank)(place, **{slot: value + place})
        whole.vector += own.vector
    return whole


SAME = {"lr": 0.001, "factor_error_exact": False, "clipped": 0}
FIELDS = {
    "round": 3,
    "train_loss": 1.0,
    "val_loss": 0.5,
    "val_exact": 0.125,
    "clients": 2,
    "received": 1,
    "seconds": 10.0,
    "tokens": 12,
    "tokens_per_s": 1.2,
    "compute_s": 3.0,
    "gather_s": 1.0,
    "exchange_s": 0.5,
    "idle_s": 0.5,
    "bytes_sent": 201,
    "peak_bytes": 2000,
    "device_bytes": 50,
    "loaded_bytes": 14,
    "step_s": 1.5,
    "bubble": 0.25,
    "overlap": 0.625,
    "lr": 0.001,
    "update_norm": None,
    "factor_error": None,
    "factor_error_exact": False,
    "clipped": 0,
    "skipped": None,
    "shortened": 0.25,
    "unclipped_norm": 1.5,
}
UNMEASURED = (
    "train_loss",
    "val_loss",
    "val_exact",
    "peak_bytes",
    "device_bytes",
    "step_s",
    "bubble",
    "overlap",
    "update_norm",
)


def test_a_ledger_becomes_a_record():
    found = round_record(filled(lambda: Ledger(2, 2)), 3, (0, 1), **SAME).to_json()
    clients = found.pop("per_client")
    assert found == FIELDS | {"missing": [1]}
    assert clients[1] == {
        "client": 1,
        "train_loss": 0.75,
        "val_loss": 0.5,
        "val_exact": 0.25,
        "local_steps": 3,
        "tokens": 8,
        "compute_s": 2.0,
        "gather_s": 1.0,
        "exchange_s": 0.5,
        "idle_s": 0.25,
        "bytes_sent": 100,
        "peak_bytes": 1000,
        "device_bytes": 500,
    }


def test_a_ledger_of_sums_becomes_the_same_record_without_what_one_rank_or_client_knows():
    found = round_record(filled(lambda: Ledger(2, 2, sums_only=True)), 3, (0, 1), **SAME)
    hidden = {"peak_bytes": None, "device_bytes": None, "step_s": None, "unclipped_norm": None}
    assert found.to_json() == FIELDS | hidden | {"missing": [], "per_client": []}
    assert found == visible(round_record(filled(lambda: Ledger(2, 2)), 3, (0, 1), **SAME), "mask")


def test_what_was_not_measured_is_no_number():
    empty = Ledger(1, 1)
    empty.set_rank(0, ranks=1, wall_s=1.0)
    record = round_record(empty, 0, (), **SAME)
    for name in UNMEASURED:
        assert getattr(record, name) is None, name
    assert (record.tokens, record.tokens_per_s, record.per_client[0].train_loss) == (0, 0.0, None)


def test_a_loss_that_has_diverged_is_not_one_that_was_told_to_nobody():
    ledger = filled(lambda: Ledger(2, 2))
    ledger.add_client(1, train_loss=math.nan)
    diverged = round_record(ledger, 3, (0, 1), **SAME)
    assert math.isnan(diverged.train_loss) and math.isnan(diverged.per_client[1].train_loss)
    hidden = round_record(filled(lambda: Ledger(2, 2, hides=frozenset({WEIGHTS}))), 3, (0, 1), **SAME)
    assert hidden.train_loss is None and hidden.per_client[1].train_loss is None
    assert hidden.val_loss == diverged.val_loss


@pytest.mark.parametrize(
    ("same", "told"),
    [({"lr": 0.1}, "lacks a value of factor_error_exact, clipped"), (SAME | {"tokens": 3}, "called tokens")],
)
def test_what_is_known_alike_is_told_by_its_name(same, told):
    with pytest.raises(ValueError, match=told):
        round_record(filled(lambda: Ledger(2, 2)), 1, (0, 1), **same)


def test_what_masked_modes_may_not_show_does_not_leave_the_rank():
    names = {"peak_bytes": 1e9, "device_bytes": 1e9, "step_s": 1e9}
    ledger = Ledger(2, 2, sums_only=True)
    ledger.set_rank(1, **names)
    ledger.add_client(1, steps=1e9, compute_s=1e9, peak_bytes=1e9)
    assert not ledger.vector.any() and ledger.vector.size < Ledger(1, 1).vector.size
    for add in (ledger.add_client, ledger.set_rank):
        with pytest.raises(ValueError, match="no metric has a slot 'horses'"):
            add(0, horses=1)
    with pytest.raises(ValueError, match="one version of FedSpeed"):
        Ledger(2, 2, ledger.vector)


def test_a_metric_that_says_so_is_shown_in_masked_modes(tmp_path, monkeypatch):
    """Otherwise it is not shown even if a ledger has it: records are checked against the list again."""
    for shown, expected in ((True, 8643.0), (False, None)):
        told = Metric(name="of_ranks", unit="number", per="rank", reduce="sum", shown_masked=shown)
        monkeypatch.setattr(registry, "METRICS", (*METRICS, told))
        for sums_only in (True, False):
            ledger = filled(lambda: Ledger(2, 2, sums_only=sums_only), [("of_ranks", 4321, "rank")])
            assert visible(round_record(ledger, 1, (0, 1), **SAME), "mask").of_ranks == expected


def test_a_metric_that_does_not_say_what_it_reveals_is_hidden_where_anything_is(monkeypatch):
    for reveals, is_told in (
        ({}, False),
        ({"reveals": frozenset({WEIGHTS})}, False),
        ({"reveals": NOTHING}, True),
    ):
        metric = Metric(name="of_ranks", unit="number", per="rank", reduce="sum", **reveals)
        monkeypatch.setattr(registry, "METRICS", (*METRICS, metric))
        ledger = Ledger(1, 1, hides=frozenset({WEIGHTS}))
        ledger.set_rank(0, ranks=1.0, of_ranks=8643.0)
        assert (8643.0 in ledger.vector) == is_told
        assert round_record(ledger, 1, (), **SAME).of_ranks == (8643.0 if is_told else None)


def test_no_metric_tells_in_its_slots_what_another_says_that_it_reveals(monkeypatch):
    """A ratio reveals neither by its denominator nor by its numerator."""
    count = {"unit": "count", "per": "client", "reduce": "sum"}
    secret = Metric(name="answers", **count, reveals=frozenset({WEIGHTS}))
    ratio = {"unit": "number", "per": "client", "reduce": "ratio", "reveals": NOTHING}
    hits = Metric(name="hit_rate", **ratio | {"reveals": frozenset({LOSSES})}, of="hits", over="asked")
    for first, second in (
        (secret, Metric(name="mean", **ratio, over="answers")),
        (hits, Metric(name="right", **count, of="hits", reveals=NOTHING)),
    ):
        module = SimpleNamespace(METRICS=(first, second))
        monkeypatch.setattr(registry, "import_module", lambda name, module=module: module)
        with pytest.raises(
            ValueError, match=f"'{second.name}' shares a slot with '{first.name}', which reveals"
        ):
            registry.collected(("one",))
