"""The local supervisor with real processes: it starts ranks, names those that died, restarts, forwards
signals and leaves no process behind.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedspeed.cluster import devices, local_ranks
from fedspeed.cluster.processes import exit_text
from fedspeed.cluster.supervisor import attempt_exit_code
from fedspeed.cluster.worker_group import RankExit
from fedspeed.errors import ConfigError
from tests.cluster.supervised import Supervised
from tests.limits import LIMIT_S

ROOT = Path(__file__).parents[2]
BOTH = pytest.mark.parametrize("way", ["fork", "spawn"])


@pytest.fixture
def supervise(tmp_path):
    started = []

    def start(way, mode):
        started.append(Supervised(tmp_path, way, mode))
        return started[-1]

    yield start
    for supervised in started:
        supervised.process.kill()
        supervised.process.wait()


@BOTH
def test_ranks_get_their_environment_and_all_end_well(supervise, way):
    run = supervise(way, "well")
    assert run.end() == (0, "", "")
    notes = run.notes()
    assert (
        [note["env"]["RANK"] for note in notes]
        == ["0", "1", "2"]
        == [note["env"]["LOCAL_RANK"] for note in notes]
    )
    env = notes[0]["env"]
    wanted = {
        "WORLD_SIZE": "3",
        "LOCAL_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "FEDSPEED_LAUNCH": "local",
        "FEDSPEED_RESTARTS": "0",
        "OMP_NUM_THREADS": str(max(1, devices.usable_cores() // 3)),
    }
    assert {key: env[key] for key in wanted} == wanted
    assert len({note["env"]["FEDSPEED_MEETING"] for note in notes}) == 1 and "MASTER_PORT" not in env
    assert len({note["pid"] for note in notes}) == 3
    assert {note["parent"] for note in notes} == {run.process.pid}, "the fork server has ended"


def test_gpus_get_fresh_processes(supervise):
    run = supervise("gpu", "well")
    assert run.end()[0] == 0
    assert {note["parent"] for note in run.notes()} == {run.process.pid}
    assert not (run.folder / "preloads").exists()


@BOTH
def test_a_killed_rank_is_named_and_all_start_again(supervise, way):
    run = supervise(way, "kill once")
    code, output, _ = run.end()
    assert code == 0
    assert run.lives() == 2
    victim = run.notes()[1]["pid"]
    assert f"rank 1 (pid {victim}) was killed by SIGKILL" in output
    assert "restart 1 of 2" in output
    if way == "fork":
        assert (run.folder / "preloads").read_text() == "xx"
    places = {note["env"]["FEDSPEED_MEETING"] for life in (0, 1) for note in run.notes(life)}
    assert len(places) == 2, "the next life meets elsewhere"


def test_restarts_without_a_new_round_are_limited(supervise):
    run = supervise("fork", "kill always")
    code, output, _ = run.end()
    assert (code, run.lives()) == (75, 3)
    assert "no restart is left" in output


def test_restarts_after_a_new_round_are_not_counted(supervise):
    run = supervise("fork", "progress")
    code, output, _ = run.end()
    assert (code, run.lives()) == (0, 5)
    assert output.count("was finished since the last start") == 3 and output.count("restart 1 of 2") == 1


@BOTH
def test_a_usage_error_of_all_ranks_is_printed_once_and_not_tried_again(supervise, way):
    run = supervise(way, "usage")
    code, output, errors = run.end()
    assert (code, output) == (2, "")
    assert errors == "fedspeed: error: x.y: wrong; write z\n"
    assert run.lives() == 1


def test_a_usage_error_of_one_rank_ends_all(supervise):
    code, _, errors = supervise("fork", "one usage").end()
    assert (code, errors) == (2, "fedspeed: error: only rank 1 sees it\n")


@pytest.mark.parametrize(
    ("way", "mode", "message", "trace"),
    [("fork", "other bug", "exit code 1", "ValueError: bug 2"), ("fork", "exit 7", "exit code 7", "")],
)
def test_another_failure_is_tried_again_and_ends_with_1(supervise, way, mode, message, trace):
    run = supervise(way, mode)
    code, output, errors = run.end()
    assert (code, run.lives()) == (1, 3)
    assert f"ended with {message}" in output and trace in errors
    assert ("once the cause of the traceback above is mended" in output) == bool(trace)


@BOTH
def test_an_exception_that_comes_again_is_not_tried_a_third_time(supervise, way):
    run = supervise(way, "bug")
    code, output, errors = run.end()
    assert (code, run.lives()) == (1, 2)
    assert (
        "not starting again: ValueError: a bug of <object object at 0x...> ended this attempt as it ended "
        "the one before it" in output
    )
    assert errors.count("ValueError: a bug of") == 2 and "no restart is left" not in output


@pytest.mark.parametrize(("mode", "code", "lives"), [("bug in every round", 0, 4), ("killed and bug", 75, 3)])
def test_an_exception_of_another_round_or_behind_a_killed_rank_is_another_one(supervise, mode, code, lives):
    run = supervise("fork", mode)
    ended, output, _ = run.end()
    assert (ended, run.lives()) == (code, lives)
    assert "not starting again" not in output


@pytest.mark.parametrize(
    ("way", "number"),
    [("fork", signal.SIGTERM), ("fork", signal.SIGINT), ("fork", signal.SIGUSR1), ("spawn", signal.SIGTERM)],
)
def test_a_signal_lets_the_ranks_finish(supervise, way, number):
    run = supervise(way, "finish")
    run.await_ranks()
    run.process.send_signal(number)
    code, output, _ = run.end()
    assert (code, run.lives()) == (75, 1)
    assert f"asked to end by {number.name}" in output
    assert len(list(run.folder.glob("finished-?"))) == 3


@BOTH
def test_ranks_that_do_not_finish_are_killed(supervise, way):
    run = supervise(way, "stubborn")
    run.await_ranks()
    started = time.monotonic()
    run.process.terminate()
    assert run.end()[0] == 75
    assert 0.9 < time.monotonic() - started < LIMIT_S / 10


def test_a_second_signal_does_not_wait(supervise):
    run = supervise("fork", "very stubborn")
    run.await_ranks()
    started = time.monotonic()
    run.process.terminate()
    time.sleep(0.2)
    run.process.terminate()
    assert run.end()[0] == 75
    assert time.monotonic() - started < LIMIT_S / 10, "without the second signal it would have been 500 s"


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_during_the_imports_does_not_wait_for_them(supervise, signals):
    run = supervise("fork", "slow preload")
    run.await_file("preloads")
    for _ in range(signals):
        run.process.send_signal(signal.SIGINT)
    code, output, errors = run.end(LIMIT_S / 5)
    assert (code, run.lives(), errors) == (75, 0, "") and "asked to end by SIGINT" in output


@BOTH
def test_ranks_die_with_a_killed_supervisor(supervise, way):
    run = supervise(way, "wait")
    run.await_ranks()
    run.process.kill()
    run.process.wait()
    run.nobody_is_left()


def test_a_killed_fork_server_is_noticed_and_replaced(supervise):
    run = supervise("fork", "kill server")
    code, output, _ = run.end()
    assert (code, run.lives()) == (0, 1)
    assert "the fork server was killed by SIGKILL" in output
    assert (run.folder / "preloads").read_text() == "xx"


def test_threads_left_by_imports_are_reported_and_ranks_start_fresh(supervise):
    run = supervise("fork", "threads")
    code, output, _ = run.end()
    assert code == 0
    assert "threads are running after the imports" in output
    assert {note["parent"] for note in run.notes()} == {run.process.pid}


@pytest.mark.parametrize(
    ("mode", "code", "message"),
    [
        ("broken preload", 1, "RuntimeError: no such library"),
        ("no fork", 1, "BlockingIOError: no more processes"),
        ("bad preload", 2, "preload dislikes it"),
    ],
)
def test_imports_and_forks_that_fail_end_the_run(supervise, mode, code, message):
    """The fork server ends with them; otherwise it would continue as a second supervisor."""
    run = supervise("fork", mode)
    ended, _, errors = run.end()
    assert ended == code and message in errors
    assert run.lives() == 0


@pytest.mark.parametrize(
    ("codes", "verdict"),
    [([0, 0], 0), ([0, 75], 75), ([-9], 75), ([-9, 1], 75), ([75, 1], 1), ([3], 1), ([2, 1, -9], 2)],
)
def test_the_verdict_follows_the_cause(codes, verdict):
    assert attempt_exit_code([RankExit(rank, 1, code) for rank, code in enumerate(codes)]) == verdict


def test_ends_in_words():
    assert exit_text(-11) == "was killed by SIGSEGV"
    assert "memory" in exit_text(-9)
    assert exit_text(-63) == "was killed by signal 63"


@pytest.mark.parametrize(
    ("setting", "clients", "gpus", "cores", "ranks", "beside_a_server"),
    [
        ("auto", 3, 0, 8, 3, 3),
        ("auto", 3, 0, 2, 1, 1),
        ("auto", 4, 0, 2, 2, 2),
        ("auto", 3, 0, 1, 1, 1),
        ("auto", 10, 0, 64, 10, 10),
        ("auto", 3, 1, 8, 1, 1),
        ("auto", 3, 2, 8, 2, 1),
        ("auto", 3, 8, 8, 6, 6),
        ("auto", 4, 8, 8, 8, 4),
        ("auto", 2, 2, 8, 2, 1),
        (5, 3, 2, 8, 5, 5),
    ],
)
def test_how_many_local_ranks(monkeypatch, setting, clients, gpus, cores, *, ranks, beside_a_server):
    """Of several GPUs, the server has one to itself."""
    monkeypatch.setattr(local_ranks, "computing_gpus", lambda env: gpus)
    monkeypatch.setattr(local_ranks, "usable_cores", lambda: cores)
    assert local_ranks.local_rank_count(setting, clients) == ranks
    assert local_ranks.local_rank_count(setting, clients, server=True) == beside_a_server


def test_more_ranks_than_a_machine_has_processes_for(monkeypatch):
    monkeypatch.setattr(local_ranks, "usable_cores", lambda: 2)
    assert local_ranks.local_rank_count(128, 3) == 128
    with pytest.raises(
        ConfigError,
        match="cluster.local_ranks=129: 129 ranks are too many for one machine of 2 cores; ask for at most "
        "128",
    ):
        local_ranks.local_rank_count(129, 3)


def test_the_supervisor_and_all_that_help_and_dry_run_reach_import_no_torch():
    modules = [
        "devices",
        "discover",
        "doctor",
        "forkserver",
        "hostfile",
        "layout",
        "local",
        "once_per_host",
        "rendezvous",
        "topology",
        "worker_group",
    ]
    script = "import sys\n" + "".join(f"import fedspeed.cluster.{name}\n" for name in modules)
    script += "print(sorted({'torch', 'numpy', 'mpi4py', 'deepspeed'} & set(sys.modules)))"
    answer = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )
    assert answer.stdout.strip() == "[]"
