"""launchers/pbs.sh on two virtual hosts. PBS itself is not there: its part is a node file, its variables and
its signals.
"""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.lab.cluster import VirtualCluster, why_not
from tests.lab.hosts import place
from tests.lab.processes import children, session_members
from tests.limits import LIMIT_S

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launchers" / "pbs.sh"

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"virtual cluster: {why_not()}")


@pytest.fixture(scope="module")
def lab():
    with VirtualCluster(place([("alpha", 2, None), ("beta", 1, None)])) as cluster:
        yield cluster


@pytest.fixture
def job(tmp_path):
    """A project folder whose launch.py only reports, and the variables of a PBS job with two slots on alpha
    and one on beta.
    """
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(ROOT / "tests" / "lab" / "ranks.py", project / "launch.py")
    nodefile = tmp_path / "nodes"
    nodefile.write_text("alpha\nalpha\nbeta\n")
    return project, {
        "PBS_ENVIRONMENT": "PBS_BATCH",
        "PBS_JOBID": "41.server",
        "PBS_O_WORKDIR": str(project),
        "PBS_NODEFILE": str(nodefile),
    }


def spoken(out: str, key: str) -> list[dict]:
    return [
        line
        for line in (json.loads(line) for line in out.splitlines() if line.startswith("{"))
        if key in line
    ]


def test_a_rank_starts_for_every_line_of_the_node_file(lab, job):
    project, variables = job
    done = lab.run(
        ["bash", SCRIPT], timeout=LIMIT_S, env={**variables, "CONFIG": "a b.yaml", "ARGS": "x=1 y=2"}, cwd="/"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = {line["rank"]: line for line in spoken(done.stdout, "rank")}
    assert {rank: line["host"] for rank, line in ranks.items()} == {0: "alpha", 1: "alpha", 2: "beta"}
    for line in ranks.values():
        assert line["args"] == ["--config", "a b.yaml", "x=1", "y=2"]
        assert line["mpi_size"] == 3
        # The node file is one that all hosts see, for the job's own is on its first node only.
        assert line["environ"] == {
            "DS_ACCELERATOR": "cpu",
            "PBS_NODEFILE": str(project / "pbs-nodes.41.server"),
        }
    assert [path.name for path in project.iterdir()] == ["launch.py"]


@pytest.mark.slow
def test_qdel_lets_every_rank_finish_its_round(lab, job):
    """Qdel sends SIGTERM to all processes of the job's session on its first node, mpirun included."""
    _, variables = job
    with lab.spawn(
        ["bash", SCRIPT], env={**variables, "ARGS": "wait"}, cwd="/", stdout=subprocess.PIPE, text=True
    ) as process:
        started = ""
        while len(spoken(started, "rank")) < 3:
            line = process.stdout.readline()
            assert line, started
            started += line
        [shell] = children(process.pid)
        for pid in session_members(shell):
            os.kill(pid, signal.SIGTERM)
        out, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 75, started + out
    assert sorted(line["saved"] for line in spoken(out, "saved")) == [0, 1, 2]
    assert all(line["asked"] for line in spoken(out, "saved"))


@pytest.mark.parametrize("remove, says", [("launch.py", "no launch.py"), ("nodes", "names no node")])
def test_a_job_that_cannot_start_says_why(lab, job, remove, says):
    project, variables = job
    if remove == "nodes":
        Path(variables["PBS_NODEFILE"]).write_text("\n")
    else:
        (project / remove).unlink()
    done = lab.run(["bash", SCRIPT], timeout=20, env=variables, cwd="/")
    assert (done.returncode, says in done.stderr) == (2, True), done.stderr
