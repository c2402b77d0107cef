"""How a process finds out how it was started.

captured_launches.json holds environments and ancestors' command lines as real launchers made them (DeepSpeed
0.19.8 with pdsh and Open MPI, Open MPI 5.0.11, torchrun 2.13, Slurm 22.05) on two hosts, node1 with two slots
and node2 with one or two; only names of folders and hosts were changed. PBS and MPICH follow their manuals.
"""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedspeed.cluster import hostfile_search
from fedspeed.cluster.discover import discover
from fedspeed.cluster.hostfile import Host, read
from fedspeed.cluster.hostnames import find_host, is_same_host
from fedspeed.errors import HostfileError
from tests.limits import LIMIT_S

ROOT = Path(__file__).parents[2]
CAPTURED = json.loads((Path(__file__).parent / "captured_launches.json").read_text(encoding="utf-8"))
TWO = "node1 slots=2\nnode2 slots=1\n# fed-host node1 gpu=A\n"


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A working folder with an empty shelf of hostfiles, cut off from this machine's /job."""
    (tmp_path / "hostfiles").mkdir()
    monkeypatch.setattr(hostfile_search, "_DEEPSPEED_DEFAULT", tmp_path / "nowhere")
    return tmp_path


def put(folder, name, text):
    path = folder / "hostfiles" / name
    path.write_text(text, encoding="utf-8")
    return path


def start(job, env, cmdlines=(), hostfile=None, hostname="node1"):
    return discover(
        env,
        [[word.replace("/job", str(job)) for word in words] for words in cmdlines],
        hostfile,
        job,
        hostname,
    )


def captured(job, name):
    return [start(job, rank["env"], rank["cmdlines"], hostname=rank["hostname"]) for rank in CAPTURED[name]]


def named_slots(launch):
    return [(host.name, host.slots) for host in launch.hosts]


def world_info(**hosts):
    text = base64.urlsafe_b64encode(
        json.dumps({host: list(range(slots)) for host, slots in hosts.items()}).encode()
    ).decode()
    return [
        "python3",
        "-u",
        "-m",
        "deepspeed.launcher.launch",
        f"--world_info={text}",
        "--node_rank=0",
        "launch.py",
    ]


def torch_env(rank, size, local_rank=0, **more):
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local_rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        **more,
    }


def mpi_env(rank, size, local_rank, local_size, **more):
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": str(size),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(local_rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(local_size),
        "PMIX_NAMESPACE": "prterun-node1-77@1",
        **more,
    }


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


# ----------------------------------------------------------------------------------------------------
# DeepSpeed and its missing hostfile


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


# ---------------------------------------------------------------------------------------------------- MPI,
# Slurm, PBS


def test_under_mpirun_a_named_file_is_the_layout_even_on_one_machine(job):
    file = put(job, "two", TWO)
    launch = start(job, mpi_env(2, 3, 2, 3), hostfile=file)
    assert (named_slots(launch), launch.local_rank, launch.master_addr) == (
        [("node1", 2), ("node2", 1)],
        2,
        "127.0.0.1",
    )
    with pytest.raises(HostfileError, match="offers 3 slots, but the launcher started 4 ranks"):
        start(job, mpi_env(0, 4, 0, 4), hostfile=file)


def test_mpirun_with_fewer_ranks_than_slots_fills_the_first_hosts(job):
    put(job, "three", "node1 slots=2\nnode2 slots=2\nnode3 slots=2\n")
    command = [["mpirun", "-n", "3", "-hostfile", "hostfiles/three", "python", "launch.py"]]
    assert named_slots(start(job, mpi_env(0, 3, 0, 2), command)) == [("node1", 2), ("node2", 1)]


def test_mpirun_that_numbers_ranks_across_hosts_is_refused(job):
    put(job, "three", "node1 slots=2\nnode2 slots=2\n")
    command = [["mpirun", "--map-by", "node", "--hostfile", "hostfiles/three", "python", "launch.py"]]
    with pytest.raises(HostfileError, match="rank 2 runs on node1, but would belong to node2.*--map-by slot"):
        start(job, mpi_env(2, 4, 1, 2), command)


def test_a_numbering_that_does_not_fit_is_seen_even_if_the_file_knows_other_names(job):
    put(job, "addresses", "127.0.0.11 slots=2\n127.0.0.12 slots=2\n")
    command = [["mpirun", "--map-by", "node", "--hostfile", "hostfiles/addresses", "python", "launch.py"]]
    with pytest.raises(
        HostfileError, match="rank 1 is local rank 0 of 2 on node2, but would be number 1 of 2 on 127.0.0.11"
    ):
        start(job, mpi_env(1, 4, 0, 2), command, hostname="node2")


def test_away_from_mpirun_only_a_file_that_agrees_with_this_rank_counts(job):
    env = mpi_env(2, 3, 0, 1)
    put(job, "other", "node1 slots=1\nnode2 slots=2\n")
    put(job, "strange", "gpu1 slots=2\ngpu2 slots=1\n")
    with pytest.raises(HostfileError, match="rank 2 on node2.*--hostfile FILE"):
        start(job, env, [["prted", "--prtemca", "ess", "env"]], hostname="node2")
    two = put(job, "two", TWO)
    assert start(job, env, [["prted"]], hostname="node2.lab.org").hostfile.path == str(two)


def test_pbs_names_the_hosts(job):
    """PBS Pro sets PBS_JOBID and PBS_NODEFILE, a file with one line per MPI rank; mpirun is given that file
    as its machine file.
    """
    nodefile = job / "aux"
    nodefile.write_text("node1\nnode1\nnode2\n")
    put(job, "two", TWO)
    pbs = {"PBS_JOBID": "42.head", "PBS_NODEFILE": str(nodefile), "PBS_ENVIRONMENT": "PBS_BATCH"}
    command = [["mpirun", "-n", "3", "-machinefile", str(nodefile), "python", "launch.py"]]
    launch = start(job, mpi_env(0, 3, 0, 2, **pbs), command)
    assert (launch.kind, named_slots(launch), launch.hosts[0].gpu) == (
        "openmpi",
        [("node1", 2), ("node2", 1)],
        "A",
    )
    with pytest.raises(HostfileError, match="stands alone in PBS job 42.head of 2 nodes"):
        start(job, pbs)
    nodefile.write_text("node1\nnode1\n")
    assert start(job, pbs).kind == "none"


def test_mpich_ranks(job):
    env = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "PBS_JOBID": "7"}
    launch = start(job, env)
    assert (launch.kind, launch.world_rank, launch.world_size, named_slots(launch)) == (
        "mpi",
        1,
        2,
        [("node1", 2)],
    )
    assert launch.master_port == start(job, {**env, "PMI_RANK": "0", "MPI_LOCALRANKID": "0"}).master_port


def test_mpich_started_over_srun_is_not_taken_for_srun(job):
    step = {
        **CAPTURED["srun"][3]["env"],
        "PMI_RANK": "2",
        "PMI_SIZE": "4",
        "MPI_LOCALRANKID": "0",
        "MPI_LOCALNRANKS": "2",
    }
    assert start(job, step, hostname="node2").kind == "mpi"


def test_srun_with_cyclic_distribution_is_refused(job):
    env = {
        **CAPTURED["srun"][0]["env"],
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "1",
        "SLURM_GTIDS": "0,2",
    }
    with pytest.raises(
        HostfileError, match="rank 2 runs on node1, but would belong to node2.*--distribution=block"
    ):
        start(job, env, hostname="node1")


def test_torchrun_inside_a_slurm_job_uses_its_nodes(job):
    env = {**CAPTURED["srun"][3]["env"], **torch_env(2, 4, 0, TORCHELASTIC_RUN_ID="x", LOCAL_WORLD_SIZE="2")}
    launch = start(job, env, hostname="node2")
    assert (launch.kind, named_slots(launch)) == ("torchrun", [("node1", 2), ("node2", 2)])


# ----------------------------------------------------------------------------------------------------
# variables that are not right


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


# ---------------------------------------------------------------------------------------------------- names
# with and without domains

SITES = (
    "gpu1.site-a.org slots=2\ngpu1.site-b.org slots=2\n# fed-host gpu1.site-a.org cluster=a gpu=A\n"
    "# fed-host gpu1.site-b.org cluster=b gpu=B\n"
)


def test_names_are_compared_as_far_as_both_are_told():
    assert is_same_host("node1.lab.org", "node1") and is_same_host("node1.lab", "NODE1.lab.org")
    assert not is_same_host("gpu1.site-a.org", "gpu1.site-b.org")
    assert not is_same_host("node1", "node10.lab.org")
    assert not is_same_host("127.0.0.1", "127.0.0.2") and not is_same_host("10.0", "10.0.0.2")


@pytest.mark.parametrize(
    ("hostname", "found"),
    [
        ("gpu1.site-b.org", 1),
        ("gpu1.site-a.org", 0),
        ("gpu1.site-a", 0),
        ("gpu1", None),
        ("gpu2.infiniband", 2),
        ("gpu2", 2),
        ("gpu1.infiniband", None),
        ("GPU1.Site-B.org", 1),
        ("gpu3", None),
    ],
)
def test_a_host_of_the_job_is_found_by_its_full_name_and_by_a_short_one_that_only_it_has(hostname, found):
    hosts = [Host(name, 1) for name in ("gpu1.site-a.org", "gpu1.site-b.org", "gpu2.site-b.org")]
    assert find_host(hosts, hostname) == (None if found is None else hosts[found])


@pytest.mark.parametrize("hostname", ["gpu1.site-b.org", "gpu1"])
def test_mpirun_over_hosts_that_differ_in_the_domain_only(job, hostname):
    put(job, "sites", SITES)
    command = [["mpirun", "-n", "4", "--hostfile", "hostfiles/sites", "python", "launch.py"]]
    launch = start(job, mpi_env(2, 4, 0, 2), command, hostname=hostname)
    assert named_slots(launch) == [("gpu1.site-a.org", 2), ("gpu1.site-b.org", 2)]
    assert launch.hosts == start(job, mpi_env(2, 4, 0, 2), [["prted"]], hostname=hostname).hosts, (
        "away from mpirun, by the shelf"
    )
    with pytest.raises(
        HostfileError, match=r"rank 2 runs on gpu1.site-a.org, but would belong to gpu1.site-b.org"
    ):
        start(job, mpi_env(2, 4, 0, 2), command, hostname="gpu1.site-a.org")


def test_deepspeed_over_hosts_that_differ_in_the_domain_only(job):
    put(job, "sites", SITES)
    world = world_info(**{"gpu1.site-a.org": 2, "gpu1.site-b.org": 2})
    for hostname in ("gpu1.site-b.org", "gpu1"):
        launch = start(job, torch_env(2, 4, 0), [world], hostname=hostname)
        assert [(host.name, host.cluster) for host in launch.hosts] == [
            ("gpu1.site-a.org", "a"),
            ("gpu1.site-b.org", "b"),
        ]
    assert (
        start(job, torch_env(0, 2), [world_info(**{"gpu1.site-b.org": 2})], hostname="gpu1").hosts[0].cluster
        == "b"
    )


def slurm_env(rank, *nodes):
    """Of the first of two ranks on the last of `nodes`."""
    return {
        **CAPTURED["srun"][0]["env"],
        "SLURM_STEP_NODELIST": ",".join(nodes),
        "SLURM_STEP_TASKS_PER_NODE": f"2(x{len(nodes)})",
        "SLURM_STEP_NUM_TASKS": str(2 * len(nodes)),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "SLURM_GTIDS": f"{rank},{rank + 1}",
    }


def test_srun_over_hosts_that_differ_in_the_domain_only(job):
    put(job, "sites", SITES)
    launch = start(job, slurm_env(2, "gpu1.site-a.org", "gpu1.site-b.org"), hostname="gpu1.site-b.org")
    assert [(host.name, host.cluster) for host in launch.hosts] == [
        ("gpu1.site-a.org", "a"),
        ("gpu1.site-b.org", "b"),
    ]
    alone = start(job, slurm_env(0, "gpu1.site-b.org"), hostname="gpu1.site-b.org")
    assert (named_slots(alone), alone.hosts[0].cluster) == ([("gpu1.site-b.org", 2)], "b"), (
        "once taken for cluster a"
    )


def test_a_short_name_takes_the_facts_of_one_host_or_of_none(job, monkeypatch):
    put(job, "sites", SITES)
    env = slurm_env(0, "gpu1")
    asked = []
    monkeypatch.setattr(
        hostfile_search.socket, "getfqdn", lambda name: asked.append(name) or "gpu1.site-b.org"
    )
    assert start(job, env, hostname="gpu1").hosts[0].cluster == "b"
    monkeypatch.setattr(hostfile_search.socket, "getfqdn", lambda name: "gpu1.site-c.org")
    assert start(job, env, hostname="gpu1").hosts[0].facts == Host("gpu1", 2).facts
    monkeypatch.setattr(hostfile_search.socket, "getfqdn", lambda name: name)
    with pytest.raises(
        HostfileError,
        match=r"sites: host gpu1 of this job may be gpu1.site-a.org or gpu1.site-b.org, .*--hostfile FILE",
    ):
        start(job, env, hostname="gpu1")
    put(job, "mine", "gpu1 slots=2\n# fed-host gpu1 gpu=MINE\n")
    assert start(job, env, hostname="gpu1").hosts[0].gpu == "MINE", "a file that names it in full"
    (job / "hostfiles" / "sites").write_text("gpu1.site-a.org slots=2\n# fed-host gpu1.site-a.org gpu=A\n")
    (job / "hostfiles" / "mine").unlink()
    assert start(job, slurm_env(0, "gpu1.site-b.org"), hostname="gpu1.site-b.org").hosts[0].gpu is None
    assert start(job, env, hostname="gpu1").hosts[0].gpu == "A"
    assert asked == ["gpu1"], "the name service is asked only where it must be"


def test_pbs_over_hosts_that_differ_in_the_domain_only(job):
    nodefile = job / "aux"
    nodefile.write_text("gpu1.site-a.org\n" * 2 + "gpu1.site-b.org\n" * 2)
    put(job, "sites", SITES)
    pbs = {"PBS_JOBID": "42.head", "PBS_NODEFILE": str(nodefile)}
    launch = start(job, mpi_env(2, 4, 0, 2, **pbs), hostname="gpu1.site-b.org")
    assert [(host.name, host.slots, host.cluster) for host in launch.hosts] == [
        ("gpu1.site-a.org", 2, "a"),
        ("gpu1.site-b.org", 2, "b"),
    ]


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
