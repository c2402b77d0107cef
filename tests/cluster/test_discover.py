"""How a process discovers its launch from its environment and its ancestors: captured launches, DeepSpeed,
and wrong environments.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedspeed.cluster.hostfile import read
from fedspeed.errors import HostfileError
from tests.cluster.launches import (
    CAPTURED,
    TWO,
    captured,
    mpi_env,
    named_slots,
    put,
    start,
    torch_env,
    world_info,
)
from tests.limits import LIMIT_S

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "kind", "slots", "local_ranks", "master", "gpu"),
    [
        ("deepspeed_local", "deepspeed", [("localhost", 2)], [0, 1], "127.0.0.1", None),
        ("deepspeed_pdsh", "deepspeed", [("node1", 2), ("node2", 1)], [0, 1, 0], "127.0.0.1", "A"),
        ("deepspeed_openmpi", "openmpi", [("node1", 2), ("node2", 1)], [0, 1, 0], "node1", "A"),
        ("mpirun_local", "openmpi", [("node1", 2)], [0, 1], "127.0.0.1", "A"),
        ("mpirun_local_hostfile", "openmpi", [("localhost", 2)], [0, 1], "127.0.0.1", None),
        ("torchrun_local", "torchrun", [("node1", 2)], [0, 1], "localhost", "A"),
        ("srun", "slurm", [("node1", 3), ("node2", 1)], [0, 1, 2, 0], "node1", "A"),
        ("srun_unequal", "slurm", [("node1", 2), ("node2", 1)], [0, 1, 0], "node1", "A"),
        ("sbatch_mpirun", "openmpi", [("node1", 2), ("node2", 2)], [0, 1, 0, 1], "node1", "A"),
        ("sbatch_mpirun_fewer", "openmpi", [("node1", 2), ("node2", 1)], [0, 1, 0], "node1", "A"),
        ("sbatch_mpirun_one_node", "openmpi", [("node1", 2)], [0, 1], "127.0.0.1", "A"),
        ("sbatch_srun_one_node", "slurm", [("node1", 2)], [0, 1], "127.0.0.1", "A"),
        ("sbatch_deepspeed", "deepspeed", [("localhost", 2)], [0, 1], "127.0.0.1", None),
    ],
)
def test_every_rank_of_a_real_launch_finds_the_same_job(job, name, kind, slots, local_ranks, *, master, gpu):
    put(job, "two", TWO)
    (job / "hf").write_text("localhost slots=2\n")
    launches = captured(job, name)
    assert [launch.world_rank for launch in launches] == list(range(len(launches)))
    assert {launch.world_size for launch in launches} == {len(launches)}
    assert [launch.local_rank for launch in launches] == local_ranks
    assert len({(launch.hosts, launch.master_addr, launch.master_port) for launch in launches}) == 1
    first = launches[0]
    assert (first.kind, named_slots(first), first.master_addr, first.hosts[0].gpu) == (
        kind,
        slots,
        master,
        gpu,
    )
    if "MASTER_PORT" not in CAPTURED[name][0]["env"]:
        assert 20000 <= first.master_port < 40000
    else:
        assert str(first.master_port) == CAPTURED[name][0]["env"]["MASTER_PORT"]


@pytest.mark.parametrize("name", ["sbatch_alone", "salloc_alone"])
def test_a_lone_process_in_a_job_of_two_nodes_is_refused(job, name):
    with pytest.raises(
        HostfileError, match=r"stands alone in Slurm job \d of 2 nodes.*srun python launch.py"
    ):
        captured(job, name)


def test_a_lone_process_in_a_job_of_one_node_may_start_local_ranks(job):
    env = {**CAPTURED["sbatch_alone"][0]["env"], "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node1"}
    assert start(job, env).kind == "none"


def test_an_interactive_shell_of_salloc_is_no_rank(job):
    env = {**CAPTURED["srun"][0]["env"], "SLURM_STEP_ID": "4294967290", "SLURM_JOB_NUM_NODES": "1"}
    assert start(job, env).kind == "none"


def test_two_launches_in_one_job_do_not_share_a_port(job):
    ports = {
        captured(job, name)[0].master_port
        for name in ("sbatch_mpirun", "sbatch_mpirun_fewer", "sbatch_srun_one_node", "srun")
    }
    assert len(ports) == 4


def test_a_plain_start_is_alone(job):
    launch = start(job, {})
    assert (launch.kind, launch.world_rank, launch.world_size, named_slots(launch)) == (
        "none",
        0,
        1,
        [("localhost", 1)],
    )
    file = put(job, "two", TWO)
    assert named_slots(start(job, {}, hostfile=file)) == [("node1", 2), ("node2", 1)]


def test_our_own_local_ranks_know_themselves(job):
    env = torch_env(1, 3, 1, FEDSPEED_LAUNCH="local", LOCAL_SIZE="3", SLURM_PROCID="0", SLURM_STEP_ID="0")
    launch = start(job, env)
    assert (launch.kind, launch.world_rank, named_slots(launch)) == ("local", 1, [("localhost", 3)])
    served = start(job, {**env, "FEDSPEED_SERVER_RANKS": "1"})
    assert [(host.slots, host.role) for host in served.hosts] == [(2, "client"), (1, "server")]


def test_deepspeed_takes_the_file_that_equals_its_world(job):
    put(job, "bigger", "node1 slots=2\nnode2 slots=2\nnode3 slots=2\n# fed-host node1 gpu=B\n")
    equal = put(job, "equal", "node1 slots=2\nnode2 slots=2\n# fed-host node1 gpu=A\n")
    launch = start(job, torch_env(0, 4), [world_info(node1=2, node2=2)])
    assert launch.hostfile.path == str(equal)


def test_deepspeed_with_include_takes_the_filtered_hosts_of_the_file(job):
    put(job, "bigger", "node1 slots=2\nnode2 slots=2\nnode3 slots=2\n# fed-host node3 gpu=B\n")
    launch = start(job, torch_env(0, 3), [world_info(node1=2, node3=1)])
    assert named_slots(launch) == [("node1", 2), ("node3", 1)]
    assert launch.hosts[1].gpu == "B"


def test_deepspeed_prefers_the_argument_of_the_deepspeed_command(job):
    put(job, "a", TWO)
    (job / "mine").write_text("node1 slots=2\nnode2 slots=1\n# fed-host node1 gpu=MINE\n")
    for arguments in (["-H", "mine"], ["--hostfile", "mine"], ["--hostfile=mine"]):
        command = [
            "/opt/venv/bin/python3",
            "/opt/venv/bin/deepspeed",
            *arguments,
            "--no_ssh",
            "launch.py",
            "--hostfile",
            "other",
        ]
        launch = start(job, torch_env(0, 3), [world_info(node1=2, node2=1), command])
        assert launch.hosts[0].gpu == "MINE"


def test_deepspeed_that_went_local_because_its_hostfile_is_missing_is_stopped(job):
    command = [
        "/opt/venv/bin/python3",
        "/opt/venv/bin/deepspeed",
        "--hostfile",
        "hostfiles/hetero1O",
        "launch.py",
    ]
    with pytest.raises(HostfileError, match="hetero1O: there is no such hostfile"):
        start(job, torch_env(0, 2), [world_info(localhost=2), command])


def test_files_that_state_different_facts_are_listed(job):
    one = put(job, "one", TWO)
    two = put(job, "two", TWO.replace("gpu=A", "gpu=B"))
    with pytest.raises(HostfileError, match="different facts") as caught:
        start(job, torch_env(0, 3), [world_info(node1=2, node2=1)])
    assert (
        str(one) in str(caught.value)
        and str(two) in str(caught.value)
        and "--hostfile FILE" in str(caught.value)
    )
    assert start(job, torch_env(0, 3), [world_info(node1=2, node2=1)], hostfile=two).hosts[0].gpu == "B"
    assert (
        start(job, torch_env(0, 3, FEDSPEED_HOSTFILE="hostfiles/one"), [world_info(node1=2, node2=1)])
        .hosts[0]
        .gpu
        == "A"
    )


def test_files_that_say_the_same_are_not_ambiguous(job):
    put(job, "one", TWO)
    put(job, "two", "# another comment\n" + TWO)
    assert start(job, torch_env(0, 3), [world_info(node1=2, node2=1)]).hosts[0].gpu == "A"


def test_trust_is_a_fact_too(job):
    put(job, "one", "node1 slots=2\nnode2 slots=1\n# fed-cluster default trust=shared\n")
    put(job, "two", "node1 slots=2\nnode2 slots=1\n")
    with pytest.raises(HostfileError, match="different facts"):
        start(job, torch_env(0, 3), [world_info(node1=2, node2=1)])


def test_deepspeed_on_several_hosts_without_a_fitting_file_is_refused(job):
    put(job, "small", "node1 slots=2\nnode2 slots=1\n")
    put(job, "broken", "node1 slots=none\n")
    with pytest.raises(HostfileError, match=r"node1 slots=2, node2 slots=2.*--hostfile FILE") as caught:
        start(job, torch_env(0, 4), [world_info(node1=2, node2=2)])
    assert "small: node1 slots=2, node2 slots=1" in str(caught.value)
    assert "broken:1" in str(caught.value), "a file that could not be read may have been the one"


def test_deepspeed_and_a_named_file_must_agree(job):
    file = put(job, "two", TWO)
    with pytest.raises(
        HostfileError, match=r"node1 slots=2, node2 slots=2, the file has node1 slots=2, node2 slots=1"
    ):
        start(job, torch_env(0, 4), [world_info(node1=2, node2=2)], hostfile=file)


def test_deepspeed_on_one_machine_may_emulate_the_hosts_of_a_named_file(job):
    file = put(job, "two", TWO)
    assert named_slots(start(job, torch_env(0, 3), [world_info(localhost=3)], hostfile=file)) == [
        ("node1", 2),
        ("node2", 1),
    ]


def test_deepspeed_numbers_unequal_hosts_in_its_own_way(job):
    """DeepSpeed's LOCAL_RANK is the world rank modulo the host's slots: on node2 here it does not start at
    0.
    """
    put(job, "uneven", "node1 slots=3\nnode2 slots=2\n")
    assert start(job, torch_env(3, 5, 1), [world_info(node1=3, node2=2)], hostname="node2").local_rank == 1


def test_a_world_info_that_is_no_world_is_refused(job):
    with pytest.raises(HostfileError, match="--world_info=bm9uZQ== .*not understood"):
        start(job, torch_env(0, 2), [["python", "--world_info=bm9uZQ=="]])


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"RANK": "4", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "RANK=4 is no rank of WORLD_SIZE=4"),
        ({"RANK": "x", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "RANK='x' is not a number"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_RANK is not set"),
        ({"PMIX_RANK": "0"}, "nothing says how many ranks"),
        ({**mpi_env(0, 1, 0, 1), "MASTER_PORT": "65535"}, "MASTER_PORT='65535'"),
    ],
)
def test_half_a_set_of_variables_is_refused(job, env, says):
    with pytest.raises(HostfileError, match=says):
        start(job, env)


def test_one_rank_needs_nothing_else(job):
    assert named_slots(start(job, mpi_env(0, 1, 0, 1))) == [("node1", 1)]


def test_the_ancestors_of_a_process_are_read_parent_first():
    script = (
        "import json; from fedspeed.cluster.discover import ancestor_cmdlines; "
        "print(json.dumps(ancestor_cmdlines()))"
    )
    shell = ["sh", "-c", '"$PYTHON" -c "$SCRIPT"; true', "deepspeed (odd) name", "--world_info=abc"]
    env = {**os.environ, "PYTHON": sys.executable, "SCRIPT": script, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        shell, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=True
    ).stdout
    ancestors = json.loads(answer)
    assert ancestors[0] == shell
    assert ancestors[1] == Path("/proc/self/cmdline").read_bytes().decode().split("\0")[:-1]


def test_the_shipped_files_do_not_contradict_each_other(job):
    """Both describe the same machines; a job on some of them must not be asked which file was meant."""
    root = ROOT / "hostfiles"
    for name in ("hetero10", "scale16"):
        put(job, name, (root / name).read_text(encoding="utf-8"))
    assert start(job, torch_env(0, 4), [world_info(node1=2, node2=2)]).hosts[0].gpu == "RTX-3090"
    full = {host.name: host.slots for host in read(root / "hetero10").hosts}
    assert start(job, torch_env(0, 20), [world_info(**full)]).hostfile.path.endswith("hetero10")
