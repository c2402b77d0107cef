import io
import json
import os
import struct
import subprocess
import sys

import pytest

from fedspeed.monitor.comparison import Comparison, ComparisonRow
from fedspeed.monitor.config import MonitorConfig
from fedspeed.monitor.metrics import registry
from fedspeed.monitor.metrics.metric import LOSSES, Metric
from fedspeed.monitor.monitor import Monitor, NoMonitor
from fedspeed.monitor.records import MissingUpdates, summarise
from fedspeed.monitor.report import Facts
from fedspeed.monitor.round_log import RoundLog
from fedspeed.monitor.trace import Trace
from tests.limits import LIMIT_S

TOKENS = 7654321  # of one client, distinct from every sum below
LOSS = 6.283185307
ADDED_VALUE = 86753
ADDED = (
    Metric(
        name="of_each",
        unit="count",
        per="client",
        reduce="sum",
        record="both",
        tag="new/each",
        column="each",
        title="all each",
        over_rounds="sum",
        panel="each",
    ),
    Metric(
        name="of_ranks",
        unit="count",
        per="rank",
        reduce="sum",
        tag="new/ranks",
        column="ranks",
        title="all ranks",
        over_rounds="last",
    ),
    Metric(
        name="of_fullest",
        unit="count",
        per="rank",
        reduce="max",
        tag="new/fullest",
        column="fullest",
        title="most",
        over_rounds="max",
    ),
    Metric(
        name="of_round",
        unit="count",
        per="round",
        reduce="same",
        tag="new/round",
        column="same",
        title="all rounds",
        over_rounds="median",
    ),
)


@pytest.fixture
def added(monkeypatch):
    """Add metrics of every kind that masked modes may not show."""
    monkeypatch.setattr(registry, "METRICS", (*registry.METRICS, *ADDED))


def run(folder, make_round, make_client, mode, secret=0):
    """Report a whole run in `folder` and return its standard output and standard error.

    Args:
        secret: changes only the values of single clients and the added metrics.
    """
    out = io.StringIO()
    err = io.StringIO()
    trace = Trace(folder, 0, 1)
    trace.round(1)
    trace.span("compute", "block 1", 0.0, 1.0)
    trace.close()
    values = {metric.name: ADDED_VALUE + secret for metric in registry.of_round() if metric in ADDED}
    with_hosts = Facts(run={"model": "tiny"}, hosts=({"host": f"secrethost{secret}"}, {"host": "other"}))
    monitor = Monitor(
        folder, MonitorConfig(), mode, 2, json_out=out, config_text="run:\n  seed: 0\n", progress_stream=err
    )
    for number in (1, 2):
        monitor.step(number, 1, 1, loss=LOSS + secret)
        clients = tuple(
            make_client(
                client,
                train_loss=LOSS + secret,
                val_loss=LOSS + 1 + secret,
                tokens=TOKENS + secret,
                idle_s=LOSS + secret,
                **{name: value for name, value in values.items() if name == "of_each"},
            )
            for client in (3 + secret, 5 + secret)
        )
        monitor.round(
            make_round(
                number,
                received=2,
                missing=(8 + secret,),
                per_client=clients,
                peak_bytes=TOKENS + secret,
                **values,
            )
        )
    summary = summarise(
        monitor.records,
        status="failed",
        total_rounds=2,
        reason=f"secrethost{secret} lost client {8 + secret}",
        exit_code=75,
        also_missing=(MissingUpdates(3, 1, (8 + secret,)),),
    )
    rows = (
        ComparisonRow(f"client {3 + secret} alone", LOSS + secret, 0.1),
        ComparisonRow("federated", 1.0, 0.9),
    )
    monitor.finish(summary, with_hosts, Comparison(rows))
    return out.getvalue(), err.getvalue()


def everything(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_plain_run_writes_everything(tmp_path, make_round, make_client, added):
    out, err = run(tmp_path / "run", make_round, make_client, "plain")
    files = everything(tmp_path / "run")
    events = [name for name in files if name.startswith("tensorboard/")]
    assert sorted(files.keys() - set(events)) == [
        "comparison.png",
        "report.md",
        "report.png",
        "rounds.jsonl",
        "summary.json",
        "timeline.png",
        "trace/rank-0.json",
    ]
    assert len(events) == 1
    # The outputs of a plain run have each marker, which shows that the search for masked modes can find them.
    seen = b"".join(files.values()) + out.encode() + err.encode()
    for marker in (
        b"secrethost0",
        str(TOKENS).encode(),
        b"client 8",
        b"6.28318",
        b"client_3/",
        struct.pack("<f", LOSS),
    ):
        assert marker in seen, marker
    value = str(ADDED_VALUE).encode()
    assert all(
        value in content
        for content in (files["rounds.jsonl"], files["summary.json"], files["report.md"], out.encode())
    )
    assert all(
        tag.encode() in files[events[0]] for tag in (*(metric.tag for metric in ADDED), "client_3/new/each")
    )
    assert all(
        heading in files["report.md"].decode()
        for metric in ADDED
        for heading in (f"| {metric.column} |", f"| {metric.title} |")
    )


def test_masked_run_shows_no_client_anywhere(tmp_path, make_round, make_client):
    out, err = run(tmp_path / "run", make_round, make_client, "masked")
    markers = (
        b"secrethost",
        str(TOKENS).encode(),
        b"client 3",
        b"client 8",
        b"6.28",
        b"7.28",
        b"client_",
        struct.pack("<f", LOSS),
        struct.pack("<d", LOSS),
    )
    for name, content in {
        **everything(tmp_path / "run"),
        "stdout": out.encode(),
        "stderr": err.encode(),
    }.items():
        for marker in markers:
            assert marker not in content, (name, marker)
    assert "- round 2: 1 update\n" in (tmp_path / "run" / "report.md").read_text()


def test_masked_outputs_depend_neither_on_single_clients_nor_on_new_metrics(
    tmp_path, make_round, make_client, monkeypatch, added
):
    # A stronger check: runs that differ only in values of single clients, or in metrics that masked modes may
    # not show, write the same bytes, also in pictures and events.
    monkeypatch.setattr("time.time", lambda: 1.7e9)
    seen = []
    for secret in (0, 40):
        monkeypatch.chdir(tmp_path)
        out, err = run(tmp_path / str(secret) / "run", make_round, make_client, "masked", secret)
        seen.append({
            **everything(tmp_path / str(secret) / "run"),
            "stdout": out,
            "stderr": err.replace(str(tmp_path / str(secret)), ""),
        })
    assert seen[0] == seen[1]
    assert "timeline.png" not in seen[0]
    report = seen[0]["report.md"]
    events = next(content for name, content in seen[0].items() if name.startswith("tensorboard/"))
    assert not any(
        text.encode() in report + events
        for metric in ADDED
        for text in (metric.tag, f"| {metric.column} |", f"| {metric.title} |")
    )


def test_json_is_one_strict_object_per_round_and_a_summary(tmp_path, make_round, make_client):
    out, err = run(tmp_path, make_round, make_client, "plain")

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    objects = [json.loads(line, parse_constant=refuse) for line in out.splitlines()]
    assert [item["event"] for item in objects] == ["round", "round", "summary"]
    assert {
        "event": "summary",
        **json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse),
    } == objects[2]
    assert (objects[1]["round"], objects[1]["missing"], objects[2]["exit_code"]) == (2, [8], 75)
    assert "missing in round 2: 1 update (client 8)" in err
    assert err.splitlines()[-1].startswith(
        "failed: 2 of 2 rounds in 20s, held-out loss 1.6000 -> 1.0667, best 1.0667 in round 2, 3 updates "
        "missing; report: "
    )


def test_a_resumed_run_reports_all_its_rounds_once(tmp_path, make_round):
    first = Monitor(tmp_path, MonitorConfig(), "plain", 4, progress_stream=io.StringIO())
    for number in (1, 2, 3):
        first.round(make_round(number))  # and then killed: neither finish nor close
    second = Monitor(tmp_path, MonitorConfig(), "plain", 4, resume_round=2, progress_stream=io.StringIO())
    for number in (3, 4):
        second.round(make_round(number))
    assert [record.round for record in second.records] == [1, 2, 3, 4]
    summary = summarise(second.records, status="finished", total_rounds=4, restarts=1)
    second.finish(summary, Facts())
    assert [record.round for record in RoundLog(tmp_path / "rounds.jsonl", 4).read()] == [1, 2, 3, 4]
    assert "**Finished**: 4 of 4 rounds in 40s." in (tmp_path / "report.md").read_text()


def test_lost_records_are_told_once_on_stderr_and_in_the_report(tmp_path, make_round):
    log = RoundLog(tmp_path / "rounds.jsonl")
    log.append(make_round(0))
    log.append(make_round(2))
    err = io.StringIO()
    monitor = Monitor(
        tmp_path, MonitorConfig(plot=False, progress=False), "plain", 3, resume_round=2, progress_stream=err
    )
    assert monitor.absent == (1,)
    assert (
        err.getvalue()
        == f"fedspeed: {tmp_path / 'rounds.jsonl'}: the record of round 1 is missing; the report lacks it, "
        "the trained state does not\n"
    )
    monitor.round(make_round(3))
    monitor.finish(
        summarise(monitor.records, status="finished", total_rounds=3, absent=monitor.absent), Facts()
    )
    assert (
        "> The record of round 1 is missing from `rounds.jsonl`: the numbers below are without it.\n"
        in (tmp_path / "report.md").read_text()
    )


def test_what_is_switched_off_is_not_written(tmp_path, make_round):
    err = io.StringIO()
    monitor = Monitor(
        tmp_path,
        MonitorConfig(tensorboard=False, progress=False, plot=False),
        "plain",
        1,
        progress_stream=err,
    )
    monitor.step(1, 1, 1)
    monitor.round(make_round(1, received=2, missing=(0,)))
    monitor.finish(summarise(monitor.records, status="finished", total_rounds=1), Facts())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.md", "rounds.jsonl", "summary.json"]
    lines = err.getvalue().splitlines()
    assert lines[0] == "missing in round 1: 1 update (client 0)"
    assert lines[1].startswith("finished: 1 of 1 rounds")
    assert len(lines) == 2


def test_close_may_be_called_twice_and_after_finish(tmp_path, make_round):
    monitor = Monitor(tmp_path, MonitorConfig(plot=False), "plain", 1, progress_stream=io.StringIO())
    monitor.round(make_round(1))
    monitor.close()
    monitor.close()
    monitor.finish(summarise(monitor.records, status="finished", total_rounds=1), Facts())


def test_other_ranks_do_nothing_with_the_same_calls(tmp_path, make_round, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    other = NoMonitor()
    other.step(1, 1, 2, loss=1.0)
    other.round(make_round(1))
    other.finish(summarise(other.records, status="finished", total_rounds=1), Facts())
    other.close()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    public = {name for name in dir(Monitor) if not name.startswith("_")}
    assert public == {name for name in dir(NoMonitor) if not name.startswith("_")}


CLAIM = """
import os, subprocess, sys
from fedspeed.monitor.stdout import JsonLines, claim_stdout
lines = JsonLines(claim_stdout())
print("a stray print")
os.write(1, b"a stray write\\n")
subprocess.run(["echo", "a stray child"])
lines.write("round", {"round": 1})
lines.write("summary", {"rounds": 1})
"""


def test_nothing_but_json_reaches_stdout():
    done = subprocess.run(
        [sys.executable, "-c", CLAIM], capture_output=True, check=True, timeout=LIMIT_S, text=True
    )
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"event": "round", "round": 1},
        {"event": "summary", "rounds": 1},
    ]
    assert {"a stray print", "a stray write", "a stray child"} <= set(done.stderr.splitlines())


def test_a_reader_that_goes_away_does_not_stop_the_run():
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-c", CLAIM],
        stdout=write_end,
        stderr=subprocess.PIPE,
        timeout=LIMIT_S,
        text=True,
        check=False,
    )
    os.close(write_end)
    assert (done.returncode, "Traceback" in done.stderr, "Exception" in done.stderr) == (0, False, False)


@pytest.mark.parametrize("mode", ["plain", "masked"])
def test_the_loss_of_a_step_is_shown_in_plain_mode_only(tmp_path, mode, monkeypatch):
    monkeypatch.setattr("fedspeed.monitor.progress.LOG_INTERVAL_S", 0.0)
    err = io.StringIO()
    Monitor(tmp_path, MonitorConfig(), mode, 1, progress_stream=err).step(1, 1, 2, loss=LOSS)
    assert ("loss 6.2832" in err.getvalue()) == (mode == "plain")
    assert "step 1/2" in err.getvalue()


def test_the_loss_of_a_step_is_not_shown_where_a_transform_of_updates_hides_it(tmp_path, monkeypatch):
    monkeypatch.setattr("fedspeed.monitor.progress.LOG_INTERVAL_S", 0.0)
    err = io.StringIO()
    monitor = Monitor(tmp_path, MonitorConfig(), "plain", 1, hides=frozenset({LOSSES}), progress_stream=err)
    monitor.step(1, 1, 2, loss=LOSS)
    assert "step 1/2" in err.getvalue() and "loss" not in err.getvalue()
