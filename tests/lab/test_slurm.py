"""A real Slurm on one machine, and launchers/slurm.sbatch on it."""

import json
import shutil
import time
from pathlib import Path

import pytest

from tests.lab.slurm import SlurmOnOneMachine, why_not
from tests.limits import LIMIT_S

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launchers" / "slurm.sbatch"

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"virtual Slurm: {why_not()}")


@pytest.fixture(scope="module")
def slurm():
    with SlurmOnOneMachine(nodes=2, cpus=4, gpus=2) as cluster:
        yield cluster


@pytest.fixture
def project(tmp_path):
    """A folder to submit from, with a launch.py that only reports."""
    shutil.copy(ROOT / "tests" / "lab" / "ranks.py", tmp_path / "launch.py")
    return tmp_path


def submit(slurm, project, args=(), env=None, script=SCRIPT):
    """Submit the script as it is, for the two nodes that there are instead of three."""
    return slurm.sbatch(script, list(args), ["--nodes=2", "--output=out"], env=env, cwd=project)


def lines(project: Path, key: str) -> list[dict]:
    """What the ranks have said so far, of the lines that hold `key`."""
    out = project / "out"
    spoken = (
        [json.loads(line) for line in out.read_text().splitlines() if line.startswith("{")]
        if out.exists()
        else []
    )
    return [line for line in spoken if key in line]


def wait_for_ranks(project: Path, count: int, timeout_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while len(lines(project, "rank")) < count:
        assert time.monotonic() < deadline, (project / "out").read_text()
        time.sleep(0.05)


# --- Slurm itself


def test_srun_starts_tasks_on_both_nodes(slurm):
    done = slurm.run([
        "srun",
        "--nodes=2",
        "--ntasks=4",
        "--distribution=block",
        "sh",
        "-c",
        "echo $SLURM_PROCID $(hostname)",
    ])
    assert done.returncode == 0, done.stderr
    tasks = dict(line.split() for line in done.stdout.splitlines())
    assert sorted(tasks) == ["0", "1", "2", "3"]
    assert set(tasks.values()) == {"node1", "node2"}


@pytest.mark.slow
def test_a_batch_script_may_call_mpirun(slurm, project):
    script = project / "mpi.sh"
    script.write_text('#!/bin/sh\nexec mpirun --bind-to none python3 launch.py "$@"\n')
    status = slurm.sbatch(
        script, ["hello"], ["--nodes=2", "--ntasks-per-node=2", "--output=out"], cwd=project
    ).wait(LIMIT_S)
    assert (status.state, status.exit_code) == ("COMPLETED", 0), (project / "out").read_text()
    ranks = {line["rank"]: line["host"] for line in lines(project, "rank")}
    assert ranks == {0: "node1", 1: "node1", 2: "node2", 3: "node2"}
    assert all(line["mpi_size"] == 4 and line["args"] == ["hello"] for line in lines(project, "rank"))


def test_scancel_sends_sigterm_to_the_step_first(slurm, project):
    script = project / "step.sh"
    script.write_text(
        '#!/bin/sh\nsrun sh -c \'trap "echo asked; exit 0" TERM; echo "{\\"rank\\": 0}"; while :; do sleep '
        "0.1; done'\n"
    )
    job = slurm.sbatch(script, [], ["--nodes=1", "--ntasks=1", "--output=out"], cwd=project)
    wait_for_ranks(project, 1)
    job.cancel()
    assert job.wait(LIMIT_S).state == "CANCELLED"
    assert "asked" in (project / "out").read_text().splitlines()


# --- launchers/slurm.sbatch


def test_a_rank_starts_for_every_gpu_with_the_arguments(slurm, project):
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "activate").write_text("export VENV_MARK=activated\n")
    status = submit(
        slurm,
        project,
        ["run.name=two words", "x=1"],
        {"CONFIG": "ds configs/a.yaml", "SLURM_MPI_TYPE": "none"},
    ).wait(LIMIT_S)
    assert (status.state, status.exit_code) == ("COMPLETED", 0), (project / "out").read_text()
    ranks = {line["rank"]: line for line in lines(project, "rank")}
    assert {rank: line["host"] for rank, line in ranks.items()} == {
        0: "node1",
        1: "node1",
        2: "node2",
        3: "node2",
    }
    for line in ranks.values():
        assert line["args"] == ["--config", "ds configs/a.yaml", "run.name=two words", "x=1"]
        assert line["environ"] == {"DS_ACCELERATOR": "cpu", "VENV_MARK": "activated"}


@pytest.mark.parametrize("hidden", [False, True], ids=["as installed", "without the library"])
def test_mpi_is_used_where_slurm_really_offers_pmix(slurm, project, hidden):
    """Debian's Slurm lists PMIx even when the library behind it is missing, which is made so here, on the
    virtual hosts alone.
    """
    libraries = list(Path("/usr/lib").glob("*/pmix2/lib")) if hidden else []
    for host in slurm.lab.hosts:
        for folder in libraries:
            slurm.lab.run(["mount", "-t", "tmpfs", "tmpfs", folder], timeout=20, host=host.name)
    try:
        offered = slurm.run(["srun", "--nodes=2", "--mpi=pmix", "true"]).returncode == 0
        assert not (hidden and offered)
        status = submit(slurm, project).wait(LIMIT_S)
    finally:
        for host in slurm.lab.hosts:
            for folder in libraries:
                slurm.lab.run(["umount", folder], timeout=20, host=host.name)
    assert (status.state, status.exit_code) == ("COMPLETED", 0), (project / "out").read_text()
    assert [line["mpi_size"] for line in lines(project, "rank")] == [4 if offered else None] * 4


def test_every_rank_finishes_its_round_before_the_time_is_up(slurm, project):
    """The signal is the one that `--signal=B:TERM@120` sends. The ranks end one after another, and
    the first does not take the others with it, though this Slurm is told to end a step of which a task has
    failed.
    """
    job = submit(slurm, project, ["wait", "stagger"], {"SLURM_MPI_TYPE": "none"})
    wait_for_ranks(project, 4)
    job.cancel("--signal=TERM", "--batch")
    status = job.wait(LIMIT_S)
    assert (status.state, status.exit_code, status.restarts) == ("FAILED", 75, 0), (
        project / "out"
    ).read_text()
    assert sorted(line["saved"] for line in lines(project, "saved")) == [0, 1, 2, 3]
    assert all(line["asked"] for line in lines(project, "saved"))


def test_a_cancelled_job_saves_and_stays_cancelled(slurm, project):
    job = submit(slurm, project, ["wait"], {"SLURM_MPI_TYPE": "none", "MAX_REQUEUES": "5"})
    wait_for_ranks(project, 4)
    job.cancel()
    status = job.wait(LIMIT_S)
    assert (status.state, status.restarts) == ("CANCELLED", 0), (project / "out").read_text()
    assert sorted(line["saved"] for line in lines(project, "saved")) == [0, 1, 2, 3]


@pytest.mark.slow
def test_an_unfinished_job_requeues_itself_when_told_so(slurm, project):
    job = submit(slurm, project, ["wait"], {"SLURM_MPI_TYPE": "none", "MAX_REQUEUES": "1"})
    wait_for_ranks(project, 4)
    job.cancel("--signal=TERM", "--batch")
    job.wait_for(lambda status: status.restarts == 1, LIMIT_S)

    # Slurm holds a requeued job back for two minutes, from the moment when its first start has been cleared
    # up. Let go within the same second, the node would refuse it as a job that was killed already.
    def started_again(status):
        time.sleep(2)
        slurm.run(["scontrol", "update", f"JobId={job.id}", "StartTime=now"])
        return status.state == "RUNNING"

    job.wait_for(started_again, LIMIT_S)
    wait_for_ranks(project, 8)
    job.cancel("--signal=TERM", "--batch")
    status = job.wait(LIMIT_S)
    assert (status.state, status.exit_code, status.restarts) == ("FAILED", 75, 1), (
        project / "out"
    ).read_text()
    assert len(lines(project, "saved")) == 8, "the log of the first start is kept"


def test_submitting_from_elsewhere_is_explained(slurm, tmp_path):
    status = submit(slurm, tmp_path).wait(LIMIT_S)
    assert (status.state, status.exit_code) == ("FAILED", 2)
    assert f"no launch.py in {tmp_path}" in (tmp_path / "out").read_text()
