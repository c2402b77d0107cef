import json
import math

import pytest

from fedspeed.monitor.records import (
    MissingUpdates,
    RoundRecord,
    Summary,
    lost_rounds,
    lost_rounds_text,
    summarise,
)
from fedspeed.monitor.visibility import visible


def test_round_survives_strict_json(make_round, make_client):
    record = make_round(
        4,
        train_loss=math.inf,
        val_loss=None,
        factor_error=None,
        update_norm=-math.inf,
        received=2,
        missing=(1,),
        per_client=(make_client(0), make_client(2, val_loss=None)),
    )
    text = json.dumps(record.to_json(), allow_nan=False)  # raises on a NaN or Infinity literal
    assert RoundRecord.from_json(json.loads(text)) == record


def test_nan_and_not_measured_stay_different(make_round):
    values = json.loads(
        json.dumps(make_round(1, train_loss=math.nan, val_loss=None).to_json(), allow_nan=False)
    )
    assert values["train_loss"] == "NaN"
    assert values["val_loss"] is None
    back = RoundRecord.from_json(values)
    assert math.isnan(back.train_loss)
    assert back.val_loss is None


def test_summary_survives_strict_json(make_round):
    records = [make_round(1, received=1, missing=(0, 2))]
    summary = summarise(records, status="failed", total_rounds=5, reason="why", exit_code=75, restarts=2)
    assert Summary.from_json(json.loads(json.dumps(summary.to_json(), allow_nan=False))) == summary


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("round", "3"),
        ("round", True),
        ("factor_error_exact", 1),
        ("factor_error_exact", None),
        ("tokens", 1.5),
        ("missing", 3),
        ("train_loss", "high"),
        ("per_client", [{}]),
    ],
)
def test_a_wrong_value_is_refused_by_name(make_round, field, value):
    values = make_round(1).to_json() | {field: value}
    with pytest.raises(ValueError, match=f"{field}|ClientRecord"):
        RoundRecord.from_json(values)


def test_a_field_too_few_or_too_many_is_refused(make_round):
    values = make_round(1).to_json()
    with pytest.raises(ValueError, match="no field extra"):
        RoundRecord.from_json(values | {"extra": 1})
    for name in ("lr", "missing"):
        with pytest.raises(ValueError, match=f"lacks .* {name}"):
            RoundRecord.from_json({field: value for field, value in values.items() if field != name})


def test_a_record_from_before_a_metric_was_there_is_read(make_round, make_client):
    values = make_round(1, per_client=(make_client(0),)).to_json()
    del values["val_exact"], values["per_client"][0]["val_exact"]
    assert RoundRecord.from_json(values) == make_round(1, per_client=(make_client(0),))


def test_counts_that_contradict_each_other_are_a_bug(make_round):
    with pytest.raises(AssertionError):
        make_round(1, received=2, missing=(0, 1))
    with pytest.raises(AssertionError):
        make_round(1, received=4)


def test_summary_adds_up(make_round):
    records = [
        make_round(
            0, train_loss=None, val_loss=3.0, tokens=0, seconds=1.0, bytes_sent=0, clients=0, received=0
        ),
        make_round(1, val_loss=1.5, bubble=0.2, overlap=0.9),
        make_round(2, val_loss=None, bubble=0.4, overlap=0.8, peak_bytes=2**32, received=2, missing=(2,)),
        make_round(3, val_loss=1.75, bubble=0.3),
        make_round(4, val_loss=math.nan),
    ]
    summary = summarise(records, status="failed", total_rounds=9, also_missing=(MissingUpdates(5, 1, (0,)),))
    assert (summary.first_val_loss, summary.best_val_loss, summary.best_round) == (3.0, 1.5, 1)
    assert math.isnan(summary.last_val_loss)
    assert (summary.rounds, summary.total_rounds, summary.seconds, summary.tokens, summary.bytes_sent) == (
        4,
        9,
        41.0,
        12000,
        16384,
    )
    assert summary.peak_bytes == 2**32
    assert summary.missing == (MissingUpdates(2, 1, (2,)), MissingUpdates(5, 1, (0,)))
    assert summary.missing_count == 2
    assert (summary.bubble, summary.overlap, summary.step_s) == (0.3, pytest.approx(0.85), None)


def test_a_loss_that_is_not_finite_is_never_the_best(make_round):
    summary = summarise(
        [make_round(1, val_loss=math.nan), make_round(2, val_loss=2.0)], status="finished", total_rounds=2
    )
    assert (summary.best_val_loss, summary.best_round) == (2.0, 2)
    assert math.isnan(summary.first_val_loss)
    for first, best in ((1.0, 0), (2.0, 0), (2.5, 1)):
        records = [make_round(0, val_loss=first), make_round(1, val_loss=2.0)]
        assert summarise(records, status="finished", total_rounds=1).best_round == best, (
            "the start counts, and wins where equal"
        )
    assert (
        summarise([make_round(1, val_loss=-math.inf)], status="finished", total_rounds=1).best_round is None
    )


def test_summary_of_nothing():
    summary = summarise([], status="failed", total_rounds=3, exit_code=1)
    assert (
        summary.rounds,
        summary.best_round,
        summary.first_val_loss,
        summary.peak_bytes,
        summary.missing,
    ) == (0, None, None, None, ())


def test_other_seconds_are_what_no_stage_claims(make_round):
    assert make_round(1).other_s == pytest.approx(0.5)
    assert make_round(1, seconds=9.0).other_s == 0.0


def test_plain_shows_everything(make_round, make_client):
    record = make_round(1, received=2, missing=(1,), per_client=(make_client(0),))
    assert visible(record, "plain") is record


@pytest.mark.parametrize("mode", ["masked", "anonymous", "", "Plain"])
def test_any_other_mode_shows_counts_and_sums_only(make_round, make_client, mode):
    record = make_round(1, received=1, missing=(0, 2), per_client=(make_client(1),))
    shown = visible(record, mode)
    assert (shown.missing, shown.per_client, shown.peak_bytes) == ((), (), None)
    assert shown.missing_count == 2
    assert (shown.train_loss, shown.tokens, shown.bytes_sent) == (
        record.train_loss,
        record.tokens,
        record.bytes_sent,
    )
    assert visible(shown, mode) == shown


def test_masked_summary_counts_but_does_not_name(make_round):
    records = [make_round(1, received=2, missing=(1,))]
    summary = summarise(
        records, status="failed", total_rounds=2, reason="client 1 on host b is gone", exit_code=75
    )
    shown = visible(summary, "masked")
    assert shown.missing == (MissingUpdates(1, 1, ()),)
    assert "client 1" not in shown.reason
    assert "host b" not in shown.reason
    assert (shown.peak_bytes, shown.exit_code, shown.tokens) == (None, 75, 3000)


def test_masked_early_stop_keeps_its_reason(make_round):
    summary = summarise(
        [make_round(1)],
        status="early stop",
        total_rounds=2,
        reason="no better held-out loss in 3 evaluations",
    )
    assert visible(summary, "masked").reason == summary.reason


def test_lost_records_are_found_and_told():
    class Known:
        def __init__(self, round):
            self.round = round

    assert lost_rounds([], -1) == () and lost_rounds([Known(0), Known(1)], 1) == ()
    assert lost_rounds([Known(1), Known(3)], 5) == (0, 2, 4, 5)
    assert lost_rounds_text((0, 1, 2)) == "the records of rounds 0 to 2 are missing"
    assert lost_rounds_text((0, 2, 4, 5)) == "the records of rounds 0, 2 and 4 to 5 are missing"
    assert lost_rounds_text((3,)) == "the record of round 3 is missing"


def test_no_later_loss_passes_for_the_first_nor_an_earlier_one_for_the_last(make_round):
    records = [make_round(number, val_loss=3.0 - number) for number in (0, 1, 2)]

    def ends(records, absent):
        summary = summarise(records, status="finished", total_rounds=3, absent=absent)
        return summary.rounds, summary.first_val_loss, summary.last_val_loss, summary.absent

    assert ends(records, ()) == (2, 3.0, 1.0, ())
    assert ends(records[2:], (0, 1)) == (2, None, 1.0, (0, 1))
    assert ends([records[0], records[2]], (1,)) == (2, 3.0, 1.0, (1,))
    assert ends(records[:2], (2,)) == (2, 3.0, None, (2,))
    assert ends([], (0, 1, 2)) == (2, None, None, (0, 1, 2))


def test_values_that_were_clipped_are_told_in_every_mode(make_round):
    records = [visible(make_round(n, clipped=n), "mask") for n in range(3)]
    summary = visible(summarise(records, status="finished", total_rounds=2), "mask")
    assert summary.clipped == 3 and summary.to_json()["clipped"] == 3
