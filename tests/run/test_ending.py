"""How a run ends: status, exit code and message after each failure and after the last round."""

import io
import json

import pytest

from fedspeed.cli.output import report_ending
from fedspeed.cluster.failures import FAILURE_VARIABLE, recorded_failures
from fedspeed.cluster.once_per_host import ONCE_VARIABLE, report_error
from fedspeed.config.load import load
from fedspeed.errors import ConfigError, LostPeerError, PlanError, Preempted
from fedspeed.monitor.records import MissingUpdates, summarise
from fedspeed.session import rank
from fedspeed.session.deployment import JobDeployment, SiteDeployment, deployment_of
from fedspeed.session.ending import (
    complete_ending,
    error_ending,
    gaps,
    ranks_ending,
    rounds_ending,
    stop_ending,
    summary_ending,
    uncounted,
    with_losses,
)
from fedspeed.session.reporting import cause_of

RESUME = "the same command resumes"


@pytest.mark.parametrize(
    ("error", "status", "code", "text"),
    [
        (ConfigError(["a", "b"]), "failed", 2, "2 problems in the configuration:\n  - a\n  - b"),
        (PlanError("too large; take more"), "failed", 2, "too large; take more"),
        (LostPeerError("rank 1 is gone", remedy=RESUME), "failed", 75, f"rank 1 is gone; {RESUME}"),
        (Preempted("asked to end"), "preempted", 75, "asked to end"),
        (ZeroDivisionError("by zero"), "failed", 1, "by zero"),
    ],
)
def test_of_an_error(error, status, code, text):
    ending = error_ending(error)
    assert (ending.status, ending.exit_code, ending.text, ending.error) == (status, code, text, error)
    assert ending.code_for_supervisor == code and text in (str(error), ending.reason + "; " + ending.remedy)


def test_a_rank_that_ends_because_another_has_reported_bad_input_reports_that(tmp_path, monkeypatch):
    asked = error_ending(Preempted("asked to end"))
    assert cause_of(asked) == asked, "under another launcher"
    monkeypatch.setenv(ONCE_VARIABLE, str(tmp_path / "said"))
    assert cause_of(asked) == asked, "nobody has reported anything"
    report_error(ConfigError("the GPU's memory is full"))
    report_error(ConfigError("the second one"))
    cause = cause_of(asked)
    assert (cause.status, cause.exit_code, cause.reason) == ("failed", 2, "the GPU's memory is full")
    lost = error_ending(LostPeerError("rank 1 is gone"))
    assert cause_of(lost) == lost


def test_lost_ranks_are_named_once_and_their_updates_are_missing():
    missing = gaps((), (0, 1), (4,), range(5))
    assert (
        missing == (MissingUpdates(2, 1, (4,)),)
        and gaps((), (), (4,), range(1, 5)) == gaps((), (0, 1), (), range(5)) == ()
    )
    lost = ["client 4 (rank 1 on b)", "client 5 (rank 2 on b)"]
    ending = with_losses(
        error_ending(LostPeerError("client 4 (rank 1 on b) is gone", remedy=RESUME)), lost, missing
    )
    assert ending.text == f"client 4 (rank 1 on b) is gone; {RESUME} (lost: client 5 (rank 2 on b))"
    assert ending.summary((), rounds=4, restarts=1, absent=(0, 1)).to_json() == {
        **summarise((), status="failed", total_rounds=4, absent=(0, 1)).to_json(),
        "exit_code": 75,
        "restarts": 1,
        "reason": ending.text,
        "missing": [missing[0].to_json()],
    }
    assert with_losses(ending, ["client 4 (rank 1 on b)"], ()).text == ending.text


@pytest.mark.parametrize(
    ("lost", "clipped", "text", "code"),
    [
        (0, 0, "", 0),
        (1, 0, "1 update did not count, see the report", 1),
        (0, 9, "some updates did not count fully", 1),
        (2, 1, "2 updates did not count, see the report; some updates did not count fully", 1),
    ],
)
def test_rounds_that_are_over(lost, clipped, text, code):
    assert uncounted(lost, clipped) == text
    assert uncounted(lost, clipped, 2) == "; ".join(
        filter(None, ("2 rounds were skipped, see the report", text))
    )
    ending = rounds_ending("early stop", ["no round beat the start", ""], uncounted(lost, clipped))
    assert (ending.status, ending.exit_code, ending.code_for_supervisor) == ("early stop", code, 0)
    assert ending.text == "; ".join(["no round beat the start"] + [text] * bool(text))
    summary = ending.summary((), rounds=4, restarts=0, absent=())
    assert (summary_ending(summary).status, summary_ending(summary).exit_code) == ("early stop", code)


def test_a_run_that_was_asked_to_stop_goes_on():
    ending = stop_ending(3, 8, "asked to end")
    assert (ending.status, ending.exit_code, ending.code_for_supervisor) == ("preempted", 75, 75)
    assert ending.text == "asked to end; round 3 is in the journal"
    assert ending.note == "stopped after round 3 of 8 (asked to end); the same command goes on from there"


def test_a_run_that_is_complete():
    done = summarise((), status="finished", total_rounds=4, absent=(4,))
    ending = complete_ending(done, folder="runs/a", number=4, asked=3)
    assert (ending.exit_code, ending.note) == (
        0,
        "runs/a is complete (finished, 4 rounds; federation.rounds=3 asks for fewer, which changes "
        "nothing): see "
        "runs/a/report.md. A larger federation.rounds goes on from there, --fresh starts anew.",
    )
    lacking = summarise((), status="early stop", total_rounds=4, also_missing=(MissingUpdates(2, 1),))
    ending = complete_ending(lacking, folder="runs/a", number=4, asked=4)
    assert (
        ending.exit_code == 1
        and "(early stop, 4 rounds; 1 update did not count, see the report)" in ending.note
        and "federation.patience" in ending.note
    )


@pytest.mark.parametrize(
    ("asked", "status", "missing"),
    [(True, "preempted", ()), (False, "failed", (MissingUpdates(1, 1, (0,)),))],
)
def test_ranks_that_could_say_nothing(asked, status, missing):
    ending = ranks_ending(
        75, asked, ["a rank was killed", "no restart is left"], (MissingUpdates(1, 1, (0,)),)
    )
    assert (ending.status, ending.exit_code, ending.missing, ending.text) == (
        status,
        75,
        missing,
        "a rank was killed; no restart is left",
    )


def test_what_is_said_of_it(tmp_path, monkeypatch, capsys):
    out = io.StringIO()
    assert report_ending(error_ending(ConfigError("x is wrong")), out) == 2
    assert json.loads(out.getvalue()) == {"event": "error", "error": "x is wrong", "exit_code": 2}
    assert report_ending(stop_ending(1, 2, "asked to end"), None) == 75
    monkeypatch.setenv(FAILURE_VARIABLE, str(tmp_path / "fault"))
    assert report_ending(error_ending(ZeroDivisionError("by zero")), None) == 1
    assert recorded_failures(tmp_path / "fault") == {"ZeroDivisionError: by zero"}
    said = capsys.readouterr().err
    assert (
        said.startswith("fedspeed: error: x is wrong\nfedspeed: stopped after round 1 of 2 (asked to end)")
        and "ZeroDivisionError: by zero" in said
    )
    assert report_ending(rounds_ending("finished", [], ""), None) == 0 and capsys.readouterr().err == ""


def test_who_has_started_it_is_decided_once():
    def config(transport):
        return load(
            None,
            ["model.base=m", "model.dtype=fp32", f"routing.transport={transport}", "routing.identity=no.key"],
        ).config

    for transport in ("auto", "mpi", "gloo", "local"):
        job = deployment_of(config(transport))
        assert (
            type(job) is JobDeployment
            and job.membership is None
            and job.seal_rows("abc") == "abc"
            and not job.renewal(True)()
        )
        assert job.make_agreement(None, is_fresh=False) is None, "it has one journal"
    assert type(deployment_of(config("tls"))) is SiteDeployment


def test_parts_are_closed_in_order_unless_something_was_raised():
    """Closing waits for other ranks, which may be lost."""
    closed = []
    with rank._closed_in_order() as closing:
        for part in ("engine", "exchange", "heartbeat"):
            closing.callback(closed.append, part)
    assert closed == ["heartbeat", "exchange", "engine"]
    with pytest.raises(LostPeerError), rank._closed_in_order() as closing:
        closing.callback(closed.append, "never")
        raise LostPeerError("gone")
    assert "never" not in closed
