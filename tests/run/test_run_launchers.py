"""The same run under every launcher: the results are equal bit for bit, and a death or a fault of one rank
ends all ranks.
"""

import os
import signal
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.processes import free_port
from tests.run.launched import (
    SETTINGS,
    assert_same_run,
    headline,
    last_round,
    records,
    refusal,
    rounds_seen,
    tree,
)

BIN = Path(sys.executable).parent
MPIRUN = (str(BIN / "mpirun"), "-n", "2", "--oversubscribe", sys.executable)
MPIRUN_FT = (str(BIN / "mpirun"), "--with-ft", "mpi", "-n", "4", "--oversubscribe", sys.executable)
PORT = str(free_port(2))  # and the one above, where the ranks meet
DEEPSPEED = (str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", PORT)
TORCHRUN = (str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", PORT)
TORCHRUN_3 = (str(BIN / "torchrun"), "--nproc-per-node", "3", "--master-port", PORT)
SLOW = {"TEST_SLOW_S": "0.4"}
QUIET = ("monitor.plot=false", "monitor.tensorboard=false")


def test_mpirun_over_mpi(workshop, whole, copy_of_whole):
    """One rank carries out `--fresh`: the earlier run of that name is moved aside once."""
    before = tree(copy_of_whole("mpi"))
    ended = workshop.finish_run(
        "run.name=mpi", "--fresh", "--json", *QUIET, launcher=MPIRUN, env={"DS_ACCELERATOR": ""}
    )  # as where nobody has set it
    assert "WARNING" not in ended.err, "DeepSpeed warns on every rank that it has found no GPU"
    run = workshop.runs / "mpi"
    assert_same_run(run, whole[1])
    assert (
        len(ended.out.splitlines()) == SETTINGS["federation"]["rounds"] + 2 and "Traceback" not in ended.text
    )
    assert "launched by openmpi" in (run / "report.md").read_text()
    assert tree(workshop.runs / "mpi.1") == before and not (workshop.runs / "mpi.2").exists()


@pytest.mark.slow
def test_mpi_survivors_go_on_without_a_killed_rank(workshop):
    """With ULFM, one of four participants dies after the first round. Nothing is restarted; later sums are
    those of the others.
    """
    run = workshop.runs / "ulfm"
    started = workshop.start_run(
        "run.name=ulfm",
        "data.clients=4",
        "routing.mode=mix+mask",
        "federation.local_optimizer=reset",
        "federation.rounds=6",
        "routing.step_deadline_s=20",
        *QUIET,
        launcher=MPIRUN_FT,
        env=SLOW,
    )
    started.until(lambda: rounds_seen(run) >= 1)
    os.kill(started.rank_pid("OMPI_COMM_WORLD_RANK", 3), signal.SIGKILL)
    ended = started.wait()
    counts = [record["received"] for record in records(run)]
    assert len(counts) == 7 and counts[1] == 4 and counts[-1] == 3, ended.text
    assert ended.code == 0 and "(lost: 3); once more with fresh masks" in ended.err
    assert (run / "adapter" / "adapter_model.safetensors").exists() and headline(run).endswith("finished")
    assert started.family() == {}


@pytest.mark.slow
def test_what_masked_sums_forbid_is_refused_under_every_launcher(workshop):
    """routing.mode=auto is masked for three participants, and only the ranks know their number."""
    ended = workshop.run(
        "--json",
        "run.name=forbidden",
        "routing.mode=auto",
        "federation.local_optimizer=keep",
        *QUIET,
        launcher=TORCHRUN_3,
    )
    assert "keeps each client's optimizer state" in refusal(ended)
    assert (
        ended.code != 0
        and "keeps each client's optimizer state" in ended.err
        and not (workshop.runs / "forbidden" / "journal").exists()
    )


@pytest.mark.slow
def test_deepspeed_over_gloo(workshop, whole):
    workshop.finish_run("run.name=deepspeed", *QUIET, launcher=DEEPSPEED)
    assert_same_run(workshop.runs / "deepspeed", whole[1])
    assert "launched by deepspeed" in (workshop.runs / "deepspeed" / "report.md").read_text()


def rank_0_without_clients(workshop, more: str = "") -> Path:
    hosts = workshop.folder / "idle-first"
    hosts.write_text("alpha slots=1\nbeta slots=2\n" + more)
    return hosts


@pytest.mark.slow
def test_an_idle_rank_0_holds_the_store_until_all_have_left(workshop):
    """A host too small for a client comes first: rank 1 reports, and rank 0 neither leaves early nor is
    waited for.
    """
    hosts = rank_0_without_clients(workshop, more="gamma slots=2\n")
    arguments = ("--hostfile", str(hosts), "cluster.ranks_per_client=2", "federation.rounds=2", *QUIET)
    ended = workshop.finish_run("run.name=idle", *arguments)
    assert "1 rank idle" in ended.err
    assert [record["received"] for record in records(workshop.runs / "idle")] == [0, 3, 3]


@pytest.mark.slow
def test_an_idle_rank_0_ends_when_a_worker_is_lost(workshop):
    run = workshop.runs / "idle-lost"
    started = workshop.start_run(
        "run.name=idle-lost",
        "--hostfile",
        str(rank_0_without_clients(workshop)),
        "cluster.ranks_per_client=2",
        "cluster.heartbeat_timeout_s=5",
        *QUIET,
        launcher=TORCHRUN_3,
        env=SLOW,
    )
    started.until(lambda: rounds_seen(run) == 1)
    os.kill(started.rank_pid("RANK", 2), signal.SIGKILL)
    assert started.wait().code != 0
    assert started.family() == {}


@pytest.mark.slow
def test_comparing_with_clients_alone_on_two_ranks_a_client(workshop):
    """ZeRO-3: every pass is matched between the ranks of a client, those for the comparison too."""
    ended = workshop.finish_run(
        "run.name=compared",
        "cluster.ranks_per_client=2",
        "federation.compare_alone=true",
        "federation.rounds=1",
        "deepspeed.base=zero3.json",
        *QUIET,
    )
    assert all(
        f"{name} " in ended.err for name in ("before", "client 0 alone", "client 2 alone", "federated")
    )


@pytest.mark.slow
def test_torchrun_over_gloo(workshop, whole):
    workshop.finish_run("run.name=torchrun", *QUIET, launcher=TORCHRUN)
    assert_same_run(workshop.runs / "torchrun", whole[1])
    assert "launched by torchrun" in (workshop.runs / "torchrun" / "report.md").read_text()


@pytest.mark.slow
def test_a_run_goes_from_one_launcher_to_the_next(workshop, whole):
    """The run is preempted under mpirun and finished by a plain start: the journal records no launcher."""
    run = workshop.runs / "moved"
    started = workshop.start_run("run.name=moved", *QUIET, launcher=MPIRUN, env=SLOW)
    started.until(lambda: rounds_seen(run) == 1)
    for pid in {started.rank_pid("OMPI_COMM_WORLD_RANK", rank) for rank in (0, 1)}:
        os.kill(pid, signal.SIGTERM)
    ended = started.wait()
    assert ended.code == 75, ended.text
    assert headline(run) == "# Run `moved`: preempted"
    workshop.finish_run("run.name=moved", *QUIET)
    assert_same_run(run, whole[1])


def killed_rank(workshop, name: str, launcher, variable: str):
    """Return a run under a launcher after rank 1 was killed in the middle of a round."""
    run = workshop.runs / name
    started = workshop.start_run(f"run.name={name}", *QUIET, launcher=launcher, env=SLOW)
    started.until(lambda: rounds_seen(run) == 1)
    os.kill(started.rank_pid(variable, 1), signal.SIGKILL)
    return started, started.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "launcher", "variable"),
    [
        ("killed-mpi", MPIRUN, "OMPI_COMM_WORLD_RANK"),
        ("killed-deepspeed", DEEPSPEED, "RANK"),
        ("killed-torchrun", TORCHRUN, "RANK"),
    ],
)
def test_a_killed_rank_ends_the_job(workshop, name, launcher, variable):
    started, ended = killed_rank(workshop, name, launcher, variable)
    assert ended.code != 0, ended.text
    assert started.family() == {}
    run = workshop.runs / name
    assert not (run / "report.md").exists() or headline(run) == f"# Run `{name}`: failed"
    assert not (run / "adapter").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "sign"), [(MPIRUN, "MPI_ABORT"), (DEEPSPEED, "")])
def test_bad_input_of_one_client_ends_all_ranks(workshop, launcher, sign):
    """Only one rank detects it. MPI_ABORT also shows that the ranks chose the MPI transport by themselves."""
    path = workshop.folder / "one-bad-client.jsonl"
    rows = ['{"instruction": "1 + 1 =", "output": "2", "category": "short"}\n'] * 20
    rows += [f'{{"instruction": "{"one " * 50}", "output": "50", "category": "long"}}\n'] * 20
    path.write_text("".join(rows))
    started = workshop.start_run(
        "--json",
        "run.name=one-bad",
        "data.task=file",
        f"data.path={path}",
        "data.clients=2",
        *QUIET,
        launcher=launcher,
    )
    ended = started.wait()
    assert launcher is DEEPSPEED or "cuts away the whole answer" in refusal(
        ended
    )  # DeepSpeed's launcher speaks on stdout itself
    assert ended.code == 2, ended.text
    assert "Traceback" not in ended.text and "cuts away the whole answer" in ended.err and sign in ended.err
    assert not (workshop.runs / "one-bad").exists()
    assert started.family() == {}


@pytest.mark.parametrize("launcher", [MPIRUN, pytest.param(DEEPSPEED, marks=pytest.mark.slow)])
def test_a_bad_configuration_ends_all_ranks_at_once(workshop, launcher):
    started = workshop.start_run("run.name=typo", "train.learning_rate=1", launcher=launcher)
    ended = started.wait()
    assert ended.code not in (0, None) and "there is no key train.learning_rate" in ended.err, ended.text
    assert "Traceback" not in ended.text and not (workshop.runs / "typo").exists()
    assert started.family() == {}


@pytest.mark.slow
@pytest.mark.parametrize("clients", [1, 2])
def test_clients_of_two_ranks(workshop, clients):
    """Both ranks of a client train on its rows: twice the sequences a step; with two clients they take turns
    on the same two ranks.
    """
    name = f"pairs-{clients}"
    arguments = (
        f"run.name={name}",
        "cluster.ranks_per_client=2",
        f"data.clients={clients}",
        "federation.rounds=3",
        *QUIET,
    )
    started = workshop.start_run(*arguments, env=SLOW)
    started.until(lambda: rounds_seen(workshop.runs / name) == 1)
    started.kill_all()  # the kept optimizers of a client of two ranks come back to both
    workshop.finish_run(*arguments)
    workshop.finish_run(f"run.name={name}-whole", *arguments[1:])
    assert_same_run(workshop.runs / name, workshop.runs / f"{name}-whole")
    rounds = records(workshop.runs / name)
    assert [(client["client"], client["local_steps"]) for client in rounds[-1]["per_client"]] == [
        (c, 3) for c in range(clients)
    ]
    assert rounds[-1]["val_loss"] < rounds[0]["val_loss"]
    state = load_file(last_round(workshop.runs / name) / "state.safetensors")
    assert any(".lora_B." in tensor and abs(state[tensor]).max() > 0 for tensor in state)
