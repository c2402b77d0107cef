"""Runs that are killed, stopped, changed and extended: the same command resumes them, with the results of an
uninterrupted run.
"""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.run.launched import (
    COLD,
    SETTINGS,
    assert_same_run,
    bits,
    headline,
    journal_rounds,
    last_round,
    records,
    rounds_seen,
    tree,
)

ROUNDS = SETTINGS["federation"]["rounds"]
SLOW = {
    "TEST_SLOW_S": "0.4"
}  # each journal entry takes so long: a round in which something can be done to a run


def stalled(workshop, run: Path, at: str):
    """Start a run and return it once it stops at the renaming of a file to `at`."""
    flag = workshop.folder / f"stalled-{run.name}-{at.replace('/', '-')}"
    started = workshop.start_run(
        f"run.name={run.name}", "monitor.plot=false", env={"TEST_STALL_AT": at, "TEST_STALLED": str(flag)}
    )
    started.until(flag.exists)
    return started


def test_kill_9_of_everything_at_any_moment(workshop, whole):
    """The run is killed while it starts, in a round, between writing the state and the entry of the journal,
    and before the export; each time the same command resumes it.
    """
    run = workshop.runs / "killed"
    started = workshop.start_run("run.name=killed", launcher=COLD)
    started.until(lambda: len(started.family()) > 1)
    started.kill_all()
    assert not run.exists()

    started = workshop.start_run("run.name=killed", env=SLOW)
    started.until(lambda: rounds_seen(run) == 1)
    started.kill_all()
    assert journal_rounds(run)[-1] in (0, 1)
    assert not (run / "report.md").exists()

    started = stalled(workshop, run, "round-000003/entry.json")
    assert (run / "journal" / "round-000003" / "state.safetensors").exists()
    started.kill_all()
    assert journal_rounds(run)[-1] == 2

    started = stalled(workshop, run, "killed/adapter")
    started.kill_all()
    assert journal_rounds(run)[-1] == ROUNDS
    assert not (run / "adapter").exists() and not (run / "report.md").exists()

    workshop.finish_run("run.name=killed", "monitor.plot=false")
    assert_same_run(run, whole[1])
    assert headline(run) == "# Run `killed`: finished"


def test_sigterm_ends_after_the_round_in_progress(workshop, whole):
    run = workshop.runs / "asked"
    started = workshop.start_run("run.name=asked", "monitor.plot=false", launcher=COLD, env=SLOW)
    started.until(lambda: rounds_seen(run) == 1)
    assert (
        "libtorch" not in Path(f"/proc/{started.process.pid}/maps").read_text()
    )  # the supervisor stays small
    started.process.terminate()
    ended = started.wait()
    assert ended.code == 75, ended.text
    assert started.family() == {}
    number = journal_rounds(run)[-1]
    assert 1 <= number < ROUNDS and rounds_seen(run) == number
    assert headline(run) == "# Run `asked`: preempted"
    assert (
        f"stopped after round {number} of {ROUNDS} (asked to end); the same command goes on from there"
        in ended.err
    )
    assert "Traceback" not in ended.err

    workshop.finish_run("run.name=asked", "monitor.plot=false")
    assert_same_run(run, whole[1])
    assert headline(run) == "# Run `asked`: finished"


@pytest.mark.slow
def test_sigterm_before_the_first_round(workshop):
    started = workshop.start_run("run.name=early", launcher=COLD)
    started.until(lambda: len(started.local_ranks()) == 2)
    started.process.terminate()
    ended = started.wait()
    assert ended.code == 75, ended.text
    assert "Traceback" not in ended.err and "cannot take part" not in ended.err
    assert started.family() == {}


@pytest.mark.slow
def test_sigterm_during_the_evaluation_before_the_first_round_says_where_it_was(workshop):
    run = workshop.runs / "evaluating"
    started = workshop.start_run(
        "run.name=evaluating",
        "data.max_rows=9000",
        "data.val_fraction=0.9",
        "data.max_val_rows=2700",
        "train.micro_batch=1",
        "monitor.progress=true",
    )
    started.until(lambda: re.search(r"evaluation before round 1  batch \d+ of 5400  ETA ", started.said()))
    started.process.terminate()
    ended = started.wait()
    assert ended.code == 75, ended.text
    where = (
        r"sked to end during the evaluation before round 1, batch \d+ of (2700|5400); the same command "
        r"goes on"
    )
    assert re.search(where, ended.err) and re.search(
        where, (run / "report.md").read_text()
    )  # of the first rank to speak, of the reporter
    assert headline(run) == "# Run `evaluating`: preempted"
    assert "Traceback" not in ended.err and started.family() == {}


def test_a_lost_rank_is_started_again(workshop, whole):
    run = workshop.runs / "lost"
    started = workshop.start_run("run.name=lost", "monitor.plot=false", env=SLOW)
    started.until(lambda: rounds_seen(run) == 1)
    os.kill(started.local_ranks()[1], signal.SIGKILL)
    ended = started.wait()
    assert ended.code == 0, ended.text
    assert re.search(r"rank 1 \(pid \d+\) was killed by SIGKILL", ended.err)
    assert_same_run(run, whole[1])
    text = (run / "report.md").read_text()
    assert headline(run) == "# Run `lost`: finished"
    assert "| restarts | 1 |" in text and "| missing updates | 0 |" in text
    assert started.family() == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "clients", "named"),
    [
        (0, "3 updates (clients 0, 1 and 2)", "rank 0 (pid"),
        (1, "1 update (client 2)", "client 2 (rank 1 on localhost)"),
    ],
)
def test_a_lost_rank_without_restarts_is_no_success(workshop, rank, clients, named):
    """Rank 0 reports the loss of rank 1. If rank 0 is lost, the supervisor reports what it knows."""
    run = workshop.runs / f"gone-{rank}"
    started = workshop.start_run(
        f"run.name={run.name}", "monitor.plot=false", "cluster.max_restarts=0", env=SLOW
    )
    started.until(lambda: rounds_seen(run) == 1)
    os.kill(started.local_ranks()[rank], signal.SIGKILL)
    ended = started.wait()
    assert ended.code == 75, ended.text
    assert f"rank {rank} (pid" in ended.err and "was killed by SIGKILL" in ended.err
    text = (run / "report.md").read_text()
    assert headline(run) == f"# Run `{run.name}`: failed"
    number = rounds_seen(run) + 1
    assert f"- round {number}: {clients}" in text
    assert named in text and "Exit code 75" in text and "| restarts | 0 |" in text
    assert started.family() == {}


@pytest.mark.slow
def test_a_report_of_an_earlier_end_does_not_outlive_a_killed_extension(workshop, copy_of_whole):
    """A finished run is extended and rank 0 is killed at once: the report must no longer say "finished"."""
    run = copy_of_whole("stale")
    started = workshop.start_run(
        "run.name=stale", "federation.rounds=9", "cluster.max_restarts=0", "monitor.plot=false", env=SLOW
    )
    started.until(lambda: rounds_seen(run) > ROUNDS)
    os.kill(started.local_ranks()[0], signal.SIGKILL)
    assert started.wait().code == 75
    assert headline(run) == "# Run `stale`: failed"


def test_a_finished_run_says_so(workshop, whole):
    before = tree(whole[1])
    ended = workshop.run("run.name=whole")
    assert ended.code == 0 and "complete (finished, 4 rounds)" in ended.err and "--fresh" in ended.err
    assert (
        f"journal  {whole[1]} is complete (finished, 4 rounds)"
        in workshop.finish_run("--dry-run", "run.name=whole").out
    )
    assert (
        f"journal  goes on after round 4 in {whole[1]}"
        in workshop.finish_run("--dry-run", "run.name=whole", "federation.rounds=9").out
    )
    assert tree(whole[1]) == before


def test_a_finished_run_without_its_export_makes_it_again(workshop, whole, copy_of_whole):
    run = copy_of_whole("unexported")
    shutil.rmtree(run / "adapter")
    workshop.finish_run("run.name=unexported", "monitor.plot=false")
    assert_same_run(run, whole[1])
    assert headline(run) == "# Run `unexported`: finished"


def test_fewer_rounds_than_a_finished_run_has_are_reported(workshop, whole):
    ended = workshop.run("run.name=whole", "federation.rounds=2")
    assert ended.code == 0 and "federation.rounds=2 asks for fewer, which changes nothing" in ended.err


@pytest.mark.slow
def test_the_last_adapter_of_an_earlier_end_does_not_outlive_it(workshop, copy_of_whole):
    """The run is extended so that its last round is the best one."""
    run = copy_of_whole("stale-last")
    shutil.copytree(run / "adapter", run / "adapter-last")
    workshop.finish_run("run.name=stale-last", f"federation.rounds={ROUNDS + 1}", "monitor.plot=false")
    assert min(records(run)[1:], key=lambda record: record["val_loss"])["round"] == ROUNDS + 1, (
        "else there is nothing to tell"
    )
    assert not (run / "adapter-last").exists()


@pytest.mark.slow
def test_an_export_that_fails_is_reported(workshop, rises):
    run = workshop.runs / "unexportable"
    started = workshop.start_run(
        "run.name=unexportable", "federation.server_lr=3", "monitor.plot=false", env=SLOW
    )
    started.until(lambda: rounds_seen(run) == ROUNDS)
    best = max((run / "journal").glob("best-*.safetensors"))
    best.write_bytes(best.read_bytes()[:100])
    ended = started.wait()
    assert ended.code == 2 and "Traceback" not in ended.err and f"{best}: cannot be read" in ended.err, (
        ended.text
    )
    assert headline(run) == "# Run `unexportable`: failed"
    assert best.name in (run / "report.md").read_text() and "starting all ranks again" not in ended.err


def remove_lines(path, *numbers):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(line for number, line in enumerate(lines) if number not in numbers))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: remove_lines(path, 2), "the record of round 2 is missing"),
        (lambda path: path.unlink(), "the records of rounds 0 to 4 are missing"),
        (lambda path: path.write_bytes(bytes(range(128, 256))), "the records of rounds 0 to 4 are missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "the record of round 4 is missing"),
    ],
)
def test_lost_records_are_reported(workshop, copy_of_whole, damage, message):
    run = copy_of_whole("forgetful")
    try:
        damage(run / "rounds.jsonl")
        ended = workshop.finish_run(
            "run.name=forgetful", f"federation.rounds={ROUNDS + 1}", "monitor.plot=false"
        )
        assert ended.err.count(message) == 1
        text = (run / "report.md").read_text()
        assert message[1:] in text and f"{ROUNDS + 1} of {ROUNDS + 1} rounds" in text
        assert ("| held-out loss, first | - |" in text) == ("0 to 4" in message)
    finally:
        shutil.rmtree(run)


def test_more_rounds_extend_a_finished_run(workshop, whole, copy_of_whole):
    run = copy_of_whole("longer")
    ended = workshop.finish_run("run.name=longer", f"federation.rounds={ROUNDS + 1}", "monitor.plot=false")
    assert ended.err.count(f"going on after round {ROUNDS} of {ROUNDS + 1}") == 1
    assert [record["round"] for record in records(run)] == list(range(ROUNDS + 2))
    assert records(run)[: ROUNDS + 1] == records(whole[1])
    assert journal_rounds(run)[-1] == ROUNDS + 1
    assert headline(run) == "# Run `longer`: finished"


def test_fewer_rounds_than_the_journal_has_end_the_run(workshop, copy_of_whole):
    """A run that has more rounds than requested exports its result and trains no further."""
    run = copy_of_whole("shorter")
    for left in (run / "adapter", last_round(run)):
        shutil.rmtree(left)
    (run / "report.md").unlink()
    ended = workshop.finish_run("run.name=shorter", "federation.rounds=2", "monitor.plot=false")
    assert journal_rounds(run)[-1] == ROUNDS - 1, ended.text
    assert (run / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=1", "train.lr: 0.003 -> 1.0"),
        ("adapter.lora_rank=8", "adapter.lora_rank: 4 -> 8"),
        ("data.clients=2", "data.clients: 3 -> 2"),
        ("deepspeed.zero_optimization.stage=1", "deepspeed.zero_optimization: None -> {'stage': 1}"),
    ],
)
def test_another_configuration_is_refused_by_name(workshop, whole, override, message):
    before = tree(whole[1])
    ended = workshop.run("run.name=whole", override)
    assert ended.code == 2 and "Traceback" not in ended.err
    assert message in ended.err and "run.name" in ended.err and "--fresh" in ended.err
    assert tree(whole[1]) == before


def test_fresh_moves_the_earlier_run_aside_only_when_the_new_one_can_start(workshop, copy_of_whole):
    run = copy_of_whole("again")
    before = tree(run)
    ended = workshop.run("--fresh", "run.name=again", "model.base=/nowhere")
    assert ended.code == 2 and tree(run) == before
    workshop.finish_run("run.name=again", "--fresh", "monitor.plot=false", "federation.rounds=1")
    assert tree(run.with_name("again.1")) == before
    assert [record["round"] for record in records(run)] == [0, 1]


def test_a_missing_update_is_reported_by_report_and_exit_code(workshop):
    """The training of a client diverges: its update does not count, the run continues without it and ends
    with exit code 1, also when started again.

    Weights grow by the factor lr * decay in each step, beyond fp32 in the third.
    """
    hosts = workshop.folder / "two-clusters"
    hosts.write_text(
        "alpha slots=1\nbeta slots=1\n# fed-host alpha cluster=one\n# fed-host beta cluster=two\n"
    )
    arguments = (
        "run.name=diverged",
        "--hostfile",
        str(hosts),
        "train.optimizer=sgd",
        "train.lr=1e18",
        "train.weight_decay=1",
        "train.local_steps=1",
        "train.local_steps_by_cluster.two=3",
        "federation.server_optimizer=none",
        "federation.server_lr=1",
        "federation.rounds=1",
        "monitor.plot=false",
    )
    ended = workshop.run(*arguments)
    run = workshop.runs / "diverged"
    assert ended.code == 1, ended.text
    assert "starting all ranks again" not in ended.err
    assert "- round 1: 1 update (client 2)" in (run / "report.md").read_text()
    assert records(run)[-1]["missing"] == [2]
    again = workshop.run(*arguments)
    assert again.code == 1 and "1 update did not count" in again.err


def test_bits_can_tell_runs_apart(workshop, whole, copy_of_whole):
    """The comparison that these tests rely on detects a single changed bit."""
    run = copy_of_whole("flipped")
    state = last_round(run) / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    assert bits(run) != bits(whole[1])
