"""Runs in the masked modes: the result is that of a plain run, and no output contains values of a single
client.
"""

import json
import os
import re
import signal
from types import SimpleNamespace

import pytest

from fedspeed.session.ending import uncounted
from tests.run.launched import records, rounds_seen, with_overrides
from tests.run.test_run_resume import SLOW

# With 18 tokens the longest answers of the built-in task lose their end.
ARGUMENTS = (
    "routing.mode=mix+mask",
    "federation.local_optimizer=reset",
    "cluster.local_ranks=3",
    "monitor.progress=true",
    "data.max_tokens=18",
)


@pytest.fixture(scope="module")
def masked(shared_workshop):
    ended = shared_workshop.finish_run(*ARGUMENTS, "run.name=masked")
    return ended, shared_workshop.runs / "masked"


@pytest.fixture(scope="module")
def clear(shared_workshop):
    """Return the folder of the same run without masks."""
    shared_workshop.finish_run(*with_overrides(ARGUMENTS, "run.name=clear", "routing.mode=plain"))
    return shared_workshop.runs / "clear"


def test_the_result_is_that_of_a_plain_sum(masked, clear):
    rounds = [records(folder) for folder in (masked[1], clear)]
    assert len(rounds[0]) == len(rounds[1]) == 5
    for hidden, clear in zip(*rounds):
        for key in ("round", "tokens", "clients", "received", "missing"):
            assert hidden[key] == clear[key]
        for key in ("train_loss", "val_loss", "update_norm"):
            assert (
                hidden[key] == pytest.approx(clear[key], rel=1e-4)
                if clear[key]
                else hidden[key] == clear[key]
            )
        assert clear["per_client"] and not hidden["per_client"] and hidden["peak_bytes"] is None


def test_rows_that_are_cut_are_reported_as_sums(masked, clear):
    """It holds at the start and in the report; a plain run reports each client."""
    line = re.search(r"fedspeed: (120 rows: 120 kept, \d+ of them cut .*; 0 lost .*)\n", masked[0].err)[1]
    assert "fedspeed: data.max_tokens=18 takes the end of the answer from" in masked[0].err
    report = (masked[1] / "report.md").read_text()
    assert (
        f"{line}." in report
        and "> data.max_tokens=18 takes the end" in report
        and "of them cut |" not in report
    )
    clear = (clear / "report.md").read_text()
    rows = re.findall(
        r"^\| (\d) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", clear[clear.index("| client | rows |") :], re.M
    )
    assert f"{line}." in clear and [row[0] for row in rows] == ["0", "1", "2"]
    assert f"120 kept, {sum(int(row[3]) for row in rows)} of them cut" in line


def test_no_output_says_anything_of_one_client(masked, clear):
    """Every file of the run and all output are searched. `clear` does name clients, which shows that the
    search finds them.
    """
    ended, folder = masked
    speaks = re.compile(rb"client[ _-]?\d|clients \d+ and|participant \d", re.I)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".md", ".jsonl", ".json", ".safetensors"} and len(files) > 8
    for path in files:
        assert not re.search(r"client|rank|site", path.name), path
        assert not speaks.search(path.read_bytes()), f"{path}: {speaks.search(path.read_bytes())}"
    assert not speaks.search(ended.text.encode()), ended.text
    assert any(speaks.search(path.read_bytes()) for path in clear.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "arguments,named",
    [
        (
            ("federation.compare_alone=true",),
            "federation.compare_alone=true shows the value of each client's rows",
        ),
        (("federation.clients_per_round=2",), "sums the updates of few and changing clients"),
        (("federation.local_optimizer=keep",), "keeps each client's optimizer state in the run's folder"),
        (
            ("federation.method=flexlora", "federation.server_optimizer=none", "federation.server_lr=1"),
            "needs every client's own values",
        ),
        (("cluster.local_ranks=2",), "routing.mode=mix+mask with 2 participants"),
        (
            ("routing.max_weight=10",),
            "answer tokens, and routing.max_weight=10 is the most that one participant may have; raise",
        ),
    ],
)
def test_what_would_undo_it_is_refused(workshop, arguments, named):
    ended = workshop.run(*with_overrides(ARGUMENTS, "run.name=refused", *arguments))
    assert ended.code == 2 and named in ended.text and "Traceback" not in ended.text
    assert not (workshop.runs / "refused").exists()


@pytest.mark.slow
def test_a_killed_rank_costs_a_restart_and_no_update(workshop, masked):
    """Gloo cannot continue without a participant: the supervisor restarts all ranks from the journal, with
    new keys and masks.
    """
    run = workshop.runs / "masked-killed"
    started = workshop.start_run(*ARGUMENTS, "run.name=masked-killed", env=SLOW)
    started.until(lambda: rounds_seen(run) == 1)
    os.kill(started.local_ranks()[1], signal.SIGKILL)
    ended = started.wait()
    assert ended.code == 0, ended.text
    found = records(run)
    expected = records(workshop.runs / "masked")
    assert [r["received"] for r in found] == [r["received"] for r in expected]
    assert found[-1]["val_loss"] == pytest.approx(expected[-1]["val_loss"], rel=1e-4)


@pytest.mark.parametrize(
    "ranks,line",
    [(3, "  mix+mask, 3 participants"), (2, "  plain, 2 participants"), (1, "  plain, 1 participant\n")],
)
def test_updates_are_masked_unless_somebody_says_otherwise(workshop, ranks, line):
    ended = workshop.run(
        "--dry-run", "routing.mode=auto", "federation.local_optimizer=reset", f"cluster.local_ranks={ranks}"
    )
    assert ended.code == 0 and f"routing{line}" in ended.out


@pytest.mark.slow
def test_too_few_to_mask_is_said_aloud(workshop):
    arguments = ("routing.mode=auto", "federation.local_optimizer=reset", "federation.rounds=1")
    two = workshop.finish_run(*arguments, "cluster.local_ranks=2", "run.name=two")
    assert "routing.mode=plain for 2 participants" in two.err and "in the clear" in two.err
    three = workshop.finish_run(*arguments, "cluster.local_ranks=3", "run.name=three")
    assert "in the clear" not in three.err
    assert (
        records(workshop.runs / "two")[-1]["per_client"]
        and not records(workshop.runs / "three")[-1]["per_client"]
    )


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        ([(0, 0), (0, 0)], ""),
        ([(1, 0), (0, 0)], "1 update did not count, see the report"),
        ([(0, 0), (0, 30)], "some updates did not count fully"),
        ([(2, 0), (0, 7)], "2 updates did not count, see the report; some updates did not count fully"),
    ],
)
def test_only_a_run_in_which_all_counted_fully_ends_with_0(rounds, said):
    """Clipped values count like missing updates: the exit code is 0 only if there is neither."""
    records = [SimpleNamespace(missing_count=missing, clipped=clipped) for missing, clipped in rounds]
    assert uncounted(sum(r.missing_count for r in records), sum(r.clipped for r in records)) == said


def test_a_finished_run_whose_values_were_clipped_ends_with_1_again(workshop, copy_of_whole):
    """Under plain python the supervisor gives the exit code, which it reads from the summary of the run."""
    run = copy_of_whole("clipped")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"clipped": 7, "exit_code": 1}))
    ended = workshop.run(f"run.name={run.name}")
    assert (
        ended.code == 1 and "is complete (finished, 4 rounds; some updates did not count fully)" in ended.err
    )
